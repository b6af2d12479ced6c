"""BERT4Rec with exact cross-entropy on MovieLens-1M.

Paper: Sun et al., CIKM'19 (arXiv 1904.06690); in the protocol here HR@10 0.2843, NDCG@10 0.1537
(Klenitskiy & Vasilev, RecSys'23, as quoted by generative-recommenders). Differs: see the model; rotary
positions, two fifths of the items masked, cosine scores; learns from all windows of long histories.
Protocol: leave-one-out, full-catalogue ranking (3,416 items), seen items filtered, model picked on
validation NDCG@10, ties in expectation. Data: the SASRec version of MovieLens-1M, `user item` lines.

    python -m experiments.train --config=configs/bert4rec_ml1m.py --workdir=runs/bert4rec --config.seed=0

Measured 2026-11-27 on one core of an Intel Xeon (AVX-512), seed 0: test HR@10 0.3012, NDCG@10 0.1708 (95 %
interval 0.1639 to 0.1787); unfiltered 0.2152 / 0.1056; validation NDCG@10 0.1732 at the last of 24 epochs;
1,166 s of training steps. One seed. With learned positions, a fifth of the items masked and twice the rows a
step, 60 epochs reached 0.2404 / 0.1281 (2026-11-23); the search is in LOG.md.
"""

from configs import common, sasrec_ml1m
from rec_jax.config import to_config_dict
from rec_jax.models.bert4rec import BERT4RecConfig


def get_config(variant=None):
    cfg = sasrec_ml1m.get_config()
    cfg.model = to_config_dict(
        BERT4RecConfig(width=128, ff_width=128, num_heads=2, dropout=0.2, l2_normalize=True, temperature=0.05)
    )
    cfg.model.position, cfg.model.mask_share = "rotary", 0.4
    cfg.train.epochs, cfg.train.eval_every_epochs = 24, 4.0
    cfg.train.batch_rows, cfg.train.micro_rows = 32, 16
    return common.apply_variant(cfg, variant)
