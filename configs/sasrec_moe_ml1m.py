"""SASRec with four experts a layer, one for each token, and exact cross-entropy on MovieLens-1M.

Nothing published to compare with; the experts follow Fedus et al., JMLR'22 (arXiv 2101.03961).
Protocol: leave-one-out, full-catalogue ranking (3,416 items), seen items filtered, model picked on
validation NDCG@10, ties in expectation. Data: the SASRec version of MovieLens-1M, `user item` lines.

    python -m experiments.train --config=configs/sasrec_moe_ml1m.py --workdir=runs/moe --config.seed=0

Settings are those of configs/sasrec_ml1m.py, so a token takes about as many multiply-adds; no search of its
own yet. CPU time against configs/sasrec_ml1m.py, in turns on one of 2 cores of an AMD EPYC (Zen 4),
2026-11-23: a training step of 8 full rows 1.23 times (least of 12), the model's forward and backward pass
of 4 rows 1.20 times (least of 30). A quarter of the slots is room to spare, and tokens move to them and back.
"""

from configs import common, sasrec_ml1m


def get_config(variant=None):
    cfg = sasrec_ml1m.get_config()
    cfg.model.num_experts, cfg.model.experts_per_token = 4, 1
    return common.apply_variant(cfg, variant)
