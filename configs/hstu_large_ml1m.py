"""HSTU with eight layers and exact cross-entropy on MovieLens-1M.

Paper: Zhai et al., ICML'24 (arXiv 2402.17152), as rerun by the authors (github.com/facebookresearch/
generative-recommenders, HSTU-large): HR@10 0.3294, NDCG@10 0.1893, selected without a validation part.
Width, heads, layers and dropout are theirs. Differs: exact softmax instead of 128 negatives; this log has no
timestamps.
Protocol: leave-one-out, full-catalogue ranking (3,416 items), seen items filtered, checkpoint selected on
validation NDCG@10, tied scores get their expected metric. Data: the SASRec version of MovieLens-1M, one
`user item` pair per line.

    python -m experiments.train --config=configs/hstu_large_ml1m.py --workdir=runs/hstu_large --config.seed=0

Not yet trained in full. A step takes 1.45 times as long as a step of configs/hstu_ml1m.py, which is wider and
has two layers (CPU time, 8 rows; 2026-11-23, 2 cores of an AMD EPYC (Zen 4)).
"""

from configs import common, hstu_ml1m


def get_config(variant=None):
    cfg = hstu_ml1m.get_config()
    cfg.model.width = 50
    cfg.model.num_layers = 8
    cfg.model.dropout = 0.2
    return common.apply_variant(cfg, variant)
