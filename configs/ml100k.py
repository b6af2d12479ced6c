"""Every sequence model on MovieLens-100K, in one global temporal split without leakage.

Protocol: the last tenth of all events is the test part and the tenth before it validation; every training
event is earlier than both, across users. Every held-out event of a user with a history is ranked against the
whole catalogue (1,682 items), seen items filtered, tied scores get their expected metric; the checkpoint with
the best validation NDCG@10 is tested. Most held-out users are new and have few events, so the numbers are far
below those of leave-one-out.
Data: a RecBole .inter file with timestamps, which HSTU's time bias reads.

    python -m experiments.train --config=configs/ml100k.py:hstu --workdir=runs/hstu --config.seed=0
    python -m experiments.reproduce --table=ml100k --output=runs/ml100k

The variant names the model type (MODEL-smoke runs on simulated data). Learning rates, sizes and epochs are
the same for all models and were not tuned: SASRec's validation score is flat after 16 of 40 epochs.
"""

from configs import common
from rec_jax.config import to_config_dict

# Settings of one model only.
SETTINGS = {
    "bert4rec": {"model.position": "rotary", "model.mask_share": 0.4},  # those of configs/bert4rec_ml1m.py
    "tiger": {
        "model.prefix_embeddings": True,
        "model.num_beams": 150,
        "semantic_ids.content": "ml-100k/ml-100k.item",  # words of titles and genres
        "semantic_ids.num_levels": 2,
        "semantic_ids.codebook_size": 128,
        "train.eval_every_epochs": 5.0,  # beam searches take longer than training
    },
}


def get_config(variant=None):
    model, smoke = common.split_variant(variant)
    cfg = common.base()
    cfg.data.path = "ml-100k/ml-100k.inter"
    cfg.data.max_len = 200
    cfg.data.split = "global_temporal"
    cfg.model = to_config_dict(common.MODEL_CONFIGS[model]())
    cfg.model.width = 64
    cfg.model.dropout = 0.3
    if "num_heads" in cfg.model:
        cfg.model.num_heads = 2
    cfg.optim.schedule = "cosine"
    cfg.optim.warmup_steps = 50
    cfg.train.epochs = 20
    cfg.train.eval_every_epochs = 2.0
    cfg.train.batch_rows = 16
    cfg.train.micro_rows = 4
    cfg.train.all_windows = True
    cfg.update_from_flattened_dict(SETTINGS.get(model, {}))
    return common.apply_variant(cfg, smoke)
