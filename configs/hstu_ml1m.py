"""HSTU with exact cross-entropy on MovieLens-1M.

Paper: Zhai et al., ICML'24 (arXiv 2402.17152); HR@10 0.3037, NDCG@10 0.1719 for 1 to 4 layers on data in the
same order (github.com/blondered/transformer_benchmark, 3,706 items). This log has no timestamps.
Protocol: leave-one-out, full-catalogue ranking (3,416 items), seen items filtered, checkpoint selected on
validation NDCG@10, tied scores get their expected metric. Data: the SASRec version of MovieLens-1M, one
`user item` pair per line.

    python -m experiments.train --config=configs/hstu_ml1m.py --workdir=runs/hstu --config.seed=0

Measured 2026-11-23 on 2 busy cores of an AMD EPYC (Zen 4), seeds 0 and 1: test HR@10 0.3288 and 0.3306,
mean 0.3297; NDCG@10 0.1922 and 0.1896, mean 0.1909 (95 % intervals over users 0.1843 to 0.2005 and
0.1819 to 0.1977); unfiltered 0.2589 / 0.1377 and 0.2522 / 0.1346; validation NDCG@10 0.1970 and 0.1966.
Seed 1: 729 s of training steps.

Settings are those of configs/sasrec_ml1m.py, except for l2_normalize and temperature: the paper's code has
both, and this model needs them because it has no final norm.
"""

from configs import common, sasrec_ml1m
from rec_jax.config import to_config_dict
from rec_jax.models.hstu import HSTUConfig


def get_config(variant=None):
    cfg = sasrec_ml1m.get_config()
    cfg.model = to_config_dict(HSTUConfig())
    cfg.model.width = 128
    cfg.model.num_heads = 2
    cfg.model.dropout = 0.3
    cfg.model.time_bias = False
    cfg.model.l2_normalize = True
    cfg.model.temperature = 0.05
    return common.apply_variant(cfg, variant)
