"""HSTU of eight layers with exact cross-entropy on MovieLens-1M.

Paper: Zhai et al., ICML'24 (arXiv 2402.17152), as rerun by the authors (github.com/facebookresearch/
generative-recommenders, HSTU-large): HR@10 0.3294, NDCG@10 0.1893, picked without a validation part. Width,
heads, layers and dropout are theirs. Differs: the exact softmax instead of 128 negatives; this log has no
times.
Protocol: leave-one-out, full-catalogue ranking (3,416 items), seen items filtered, model picked on
validation NDCG@10, ties in expectation. Data: the SASRec version of MovieLens-1M, `user item` lines.

    python -m experiments.train --config=configs/hstu_large_ml1m.py --workdir=runs/hstu_large --config.seed=0

Not yet measured in full. A step takes 1.45 times as long as one of configs/hstu_ml1m.py, which is wider and
has two layers (CPU time, 8 rows; 2026-11-23, 2 cores of an AMD EPYC (Zen 4)).
"""

from configs import hstu_ml1m


def get_config(variant=None):
    cfg = hstu_ml1m.get_config(variant)
    if variant != "smoke":
        cfg.model.width, cfg.model.num_layers, cfg.model.dropout = 50, 8, 0.2
    return cfg
