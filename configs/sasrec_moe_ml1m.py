"""SASRec with four experts per layer, one for each token, and exact cross-entropy on MovieLens-1M.

Nothing is published to compare with; the experts follow Fedus et al., JMLR'22 (arXiv 2101.03961).
Protocol: leave-one-out, full-catalogue ranking (3,416 items), seen items filtered, checkpoint selected on
validation NDCG@10, tied scores get their expected metric. Data: the SASRec version of MovieLens-1M, one
`user item` pair per line.

    python -m experiments.train --config=configs/sasrec_moe_ml1m.py --workdir=runs/moe --config.seed=0

Settings are those of configs/sasrec_ml1m.py, so a token takes about as many multiply-adds; no search of its
own yet. CPU time relative to configs/sasrec_ml1m.py, alternating on one of 2 cores of an AMD EPYC (Zen 4),
2026-11-23: 1.23 for a training step of 8 full rows (minimum of 12), 1.20 for the model's forward and backward
pass over 4 rows (minimum of 30). A quarter of the expert slots stay empty, and tokens are moved to the slots
and back.
"""

from configs import common, sasrec_ml1m


def get_config(variant=None):
    cfg = sasrec_ml1m.get_config()
    cfg.model.num_experts = 4
    cfg.model.experts_per_token = 1
    return common.apply_variant(cfg, variant)
