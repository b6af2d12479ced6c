"""MovieLens-100K under a global temporal split: every sequence model in one protocol without leakage.

Protocol: the last tenth of all events is the test part, the tenth before it validation; all training events
are earlier than theirs, across users. Every held-out event of a user with a history is ranked against the
whole catalogue (1,682 items), seen items filtered, ties in expectation; the model of the best validation
NDCG@10 is tested. Most of the held-out users are new, with few events: the numbers are far below those of
leave-one-out.
Data: a RecBole .inter file, with times, which HSTU's bias reads.

    python -m experiments.train --config=configs/ml100k.py:hstu --workdir=runs/hstu --config.seed=0
    python -m experiments.reproduce --table=ml100k --output=runs/ml100k

The variant names the model (MODEL-smoke on simulated data). Rates, sizes and epochs are the same for all, and
none was searched for: SASRec's validation score is flat after 16 epochs of 40.
"""

from configs import common
from rec_jax.config import to_config_dict
from rec_jax.models.registry import MODELS

_BY_TYPE = {config.type: config for config in MODELS}


def get_config(variant=None):
    name, _, smoke = (variant or "sasrec").partition("-")
    if name == "smoke":
        name, smoke = "sasrec", "smoke"
    if name not in _BY_TYPE:
        raise ValueError(f"variant {variant!r}: there is no model {name!r}; use {', '.join(_BY_TYPE)}")
    cfg = common.base()
    cfg.data.path, cfg.data.max_len = "ml-100k/ml-100k.inter", 200
    cfg.data.split = "global_temporal"
    cfg.model = to_config_dict(_BY_TYPE[name](width=64, dropout=0.3))
    if "num_heads" in cfg.model:
        cfg.model.num_heads = 2
    if name == "bert4rec":  # positions and masks of configs/bert4rec_ml1m.py
        cfg.model.position, cfg.model.mask_share = "rotary", 0.4
    if name == "tiger":
        cfg.model.prefix_embeddings, cfg.model.num_beams = True, 150
        cfg.semantic_ids.content = "ml-100k/ml-100k.item"  # words of titles and genres
        cfg.semantic_ids.num_levels, cfg.semantic_ids.codebook_size = 2, 128
        if smoke:
            cfg.semantic_ids.content, cfg.semantic_ids.codebook_size, cfg.semantic_ids.content_dims = (
                "",
                8,
                16,
            )
            cfg.semantic_ids.max_shared = 1.0
    cfg.optim.schedule, cfg.optim.warmup_steps = "cosine", 50
    cfg.train.epochs = 20
    cfg.train.eval_every_epochs = 5.0 if name == "tiger" else 2.0  # searches take longer than training
    cfg.train.batch_rows, cfg.train.micro_rows = 16, 4
    cfg.train.all_windows = True
    return common.apply_variant(cfg, smoke)
