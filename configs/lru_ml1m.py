"""A gated linear recurrent unit (LRU) with exact cross-entropy on MovieLens-1M.

Papers: De et al., arXiv 2402.19427, for the unit; LRURec (Yue et al., WSDM'24, arXiv 2310.02367) and
Mamba4Rec (arXiv 2403.03900) for its use here. Nothing is published in this protocol.
Protocol: leave-one-out, full-catalogue ranking (3,416 items), seen items filtered, checkpoint selected on
validation NDCG@10, tied scores get their expected metric. Data: the SASRec version of MovieLens-1M, one
`user item` pair per line.

    python -m experiments.train --config=configs/lru_ml1m.py --workdir=runs/lru --config.seed=0

Settings are those of configs/esasrec_ml1m.py where they apply. Not yet trained in full.
"""

from configs import common, sasrec_ml1m
from rec_jax.config import to_config_dict
from rec_jax.models.lru import LRUConfig


def get_config(variant=None):
    cfg = sasrec_ml1m.get_config()
    cfg.model = to_config_dict(LRUConfig())
    cfg.model.width = 128
    cfg.model.ff_width = 128
    cfg.model.dropout = 0.3
    cfg.model.l2_normalize = True
    cfg.model.temperature = 0.05
    cfg.train.epochs = 16
    cfg.train.batch_rows = 32
    return common.apply_variant(cfg, variant)
