"""eSASRec with exact cross-entropy on MovieLens-1M.

Paper: Tikhonovich et al., RecSys'25 (arXiv 2508.06450): HR@10 0.3133, NDCG@10 0.1772 with sampled
softmax on 3,706 items.
Protocol: leave-one-out, full-catalogue ranking (3,416 items), seen items filtered, model picked on
validation NDCG@10, ties in expectation. Data: the SASRec version of MovieLens-1M, `user item` lines.

    python -m experiments.train --config=configs/esasrec_ml1m.py --workdir=runs/esasrec --config.seed=0

Measured 2026-11-23 on 2 busy cores of an AMD EPYC (Zen 4), seed 0: test HR@10 0.3116, NDCG@10 0.1804 (95 %
interval 0.1728 to 0.1889); unfiltered 0.2563 / 0.1327; validation NDCG@10 0.1876 at epoch 22 of 24. One
seed.

Settings are those of configs/sasrec_ml1m.py, and cosine scores; the search has hardly begun.
"""

from configs import common, sasrec_ml1m
from rec_jax.config import to_config_dict
from rec_jax.models.esasrec import ESASRecConfig


def get_config(variant=None):
    cfg = sasrec_ml1m.get_config()
    cfg.model = to_config_dict(
        ESASRecConfig(width=128, ff_width=128, num_heads=2, dropout=0.3, l2_normalize=True, temperature=0.05)
    )
    cfg.train.epochs, cfg.train.batch_rows = 16, 32
    return common.apply_variant(cfg, variant)
