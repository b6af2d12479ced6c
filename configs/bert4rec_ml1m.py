"""BERT4Rec with exact cross-entropy on MovieLens-1M.

Paper: Sun et al., CIKM'19 (arXiv 1904.06690); HR@10 0.2843, NDCG@10 0.1537 in this protocol (Klenitskiy &
Vasilev, RecSys'23, as quoted by generative-recommenders). Differs: see the model; rotary positions, 40 % of
the items masked, cosine scores; trains on all windows of long histories.
Protocol: leave-one-out, full-catalogue ranking (3,416 items), seen items filtered, checkpoint selected on
validation NDCG@10, tied scores get their expected metric. Data: the SASRec version of MovieLens-1M, one
`user item` pair per line.

    python -m experiments.train --config=configs/bert4rec_ml1m.py --workdir=runs/bert4rec --config.seed=0

Measured 2026-11-27 on one core of an Intel Xeon (AVX-512), seed 0: test HR@10 0.3012, NDCG@10 0.1708 (95 %
interval 0.1639 to 0.1787); unfiltered 0.2152 / 0.1056; validation NDCG@10 0.1732 at the last of 24 epochs;
1,166 s of training steps. One seed. With learned positions, 20 % of the items masked and twice the rows per
step, 60 epochs reached 0.2404 / 0.1281 (2026-11-23); LOG.md describes the search.
"""

from configs import common, sasrec_ml1m
from rec_jax.config import to_config_dict
from rec_jax.models.bert4rec import BERT4RecConfig


def get_config(variant=None):
    cfg = sasrec_ml1m.get_config()
    cfg.model = to_config_dict(BERT4RecConfig())
    cfg.model.width = 128
    cfg.model.ff_width = 128
    cfg.model.num_heads = 2
    cfg.model.dropout = 0.2
    cfg.model.position = "rotary"
    cfg.model.mask_share = 0.4
    cfg.model.l2_normalize = True
    cfg.model.temperature = 0.05
    cfg.train.epochs = 24
    cfg.train.eval_every_epochs = 4.0
    cfg.train.batch_rows = 32
    cfg.train.micro_rows = 16
    return common.apply_variant(cfg, variant)
