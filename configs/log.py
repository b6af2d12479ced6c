"""Any model on your own log: --config=configs/log.py:MODEL --config.data.path=FILE.

The variant names the model type: sasrec (the default), esasrec, bert4rec, gru4rec, hstu, lru or tiger. The
log is a CSV or Parquet file with a user, an item and a time in each row (docs/data.md lists other formats and
the flags that name its columns). Training stops when validation NDCG@10 has not improved for five
evaluations. Steps are small, so that a small log gets enough of them; the configs for MovieLens and Beauty
show what to change for a larger one.

    python -m experiments.train --config=configs/log.py:hstu --config.data.path=my.csv --workdir=runs/my_hstu

Measured: docs/reproduction.md, "Every model on your own log".
"""

from configs import common
from rec_jax.config import to_config_dict

# Settings that were good on MovieLens and Beauty; everything else is at the default of the model.
COSINE = {"l2_normalize": True, "temperature": 0.05}
SETTINGS = {
    "sasrec": {"dropout": 0.3},
    "esasrec": {"dropout": 0.3, "num_heads": 2, **COSINE},
    "bert4rec": {"dropout": 0.2, "num_heads": 2, "position": "rotary", "mask_share": 0.4, **COSINE},
    "gru4rec": {"dropout": 0.3, "hidden_width": 128, **COSINE},
    "hstu": {"dropout": 0.3, "num_heads": 2, **COSINE},
    "lru": {"dropout": 0.3, **COSINE},
    "tiger": {"dropout": 0.2, "prefix_embeddings": True},
}


def get_config(variant=None):
    model, smoke = common.split_variant(variant)
    cfg = common.base()
    cfg.data.max_len = 100
    cfg.model = to_config_dict(common.MODEL_CONFIGS[model]())
    cfg.model.update(SETTINGS.get(model, {}))
    cfg.train.epochs = 200
    cfg.train.patience = 5
    cfg.train.eval_every_epochs = 2.0
    cfg.train.batch_rows = 16
    cfg.train.micro_rows = 8
    return common.apply_variant(cfg, smoke)
