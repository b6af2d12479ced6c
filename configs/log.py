"""Any model on your own log: --config=configs/log.py:MODEL --config.data.path=FILE.

The variant names the model type: sasrec (the default), esasrec, bert4rec, gru4rec, hstu, lru or tiger; with
-smoke (hstu-smoke) it runs in seconds on simulated data. The log is a CSV or Parquet file with a user, an
item and a time in each row (docs/data.md lists other formats and the flags that name its columns). Training
stops when validation NDCG@10 has not improved for five evaluations. Steps are small, so that a small log
gets enough of them; the configs for MovieLens and Beauty show what to change for a larger one.

    python -m experiments.train --config=configs/log.py:hstu --config.data.path=my.csv --workdir=runs/my_hstu
"""

from configs import common
from rec_jax.config import to_config_dict

# Settings that were good on MovieLens and Beauty; everything else is at its default.
COSINE = {"model.l2_normalize": True, "model.temperature": 0.05}
SETTINGS = {
    "sasrec": {"model.dropout": 0.3},
    "esasrec": {"model.dropout": 0.3, "model.num_heads": 2, **COSINE},
    "bert4rec": {
        "model.dropout": 0.2,
        "model.num_heads": 2,
        "model.position": "rotary",
        "model.mask_share": 0.4,
        **COSINE,
    },
    "gru4rec": {"model.dropout": 0.3, "model.hidden_width": 128, **COSINE},
    "hstu": {"model.dropout": 0.3, "model.num_heads": 2, **COSINE},
    "lru": {"model.dropout": 0.3, **COSINE},
    "tiger": {
        "model.dropout": 0.2,
        "model.prefix_embeddings": True,
        "semantic_ids.max_shared": 1.0,  # the report says how many items share their codes
    },
}


def get_config(variant=None):
    model, smoke = common.split_variant(variant)
    cfg = common.base()
    cfg.data.max_len = 100
    cfg.model = to_config_dict(common.MODEL_CONFIGS[model]())
    cfg.update_from_flattened_dict(SETTINGS.get(model, {}))
    cfg.train.epochs = 200
    cfg.train.patience = 5
    cfg.train.eval_every_epochs = 2.0
    cfg.train.batch_rows = 16
    cfg.train.micro_rows = 8
    return common.apply_variant(cfg, smoke)
