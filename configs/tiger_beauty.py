"""A TIGER-class model on Amazon Beauty (2014, 5-core): it writes the codes of the next item.

Paper: Rajput et al., NeurIPS'23 (arXiv 2305.05065); 0.0648 (Recall@10) and 0.0384 (NDCG@10) on this split.
Differs: codes are made of the brand and category of an item alone (`Beauty_item2attributes.json`; the paper
embeds title, price, brand and category by Sentence-T5), in two levels by residual k-means; that leaves 92 %
of the items with the codes of others, up to 202, which the last level counts, the most frequent in training
first. So that these can be told apart, each beginning of codes has a vector of its own (`model.prefix_embeddings`),
read and scored, the last of them one of the item. A causal transformer; see rec_jax/models/tiger.py.
Protocol: leave-one-out, full-catalogue ranking (12,101 items) of the 30 items that a beam search finds, seen
items filtered, picked on validation NDCG@10. Data: `user item item ...` lines.

    python -m experiments.train --config=configs/tiger_beauty.py --workdir=runs/tiger_beauty

There are Q tokens an item, so of attention's softmax Q * Q times as much as SASRec has, which no multiply-add
counts: a training step takes 1.54 times SASRec's at equal multiply-adds (`experiments.benchmark
--suite=models`). A search of 50 beams for the next items of a history of 50, in 10,000 items, takes 14.5 ms
(`--suite=beam`; both 2026-11-27, one busy core of an Intel Xeon).

Measured 2026-11-27 on one busy core of an Intel Xeon (AVX-512), seeds 0 and 1: test HR@10 0.0777 and 0.0769,
mean 0.0773; NDCG@10 0.0440 and 0.0445, mean 0.0443 (95 % intervals 0.0421 to 0.0464 and 0.0423 to 0.0468);
unfiltered 0.0691 / 0.0365 and 0.0681 / 0.0376; validation NDCG@10 0.0597 and 0.0610. Seed 0: 238 s of
training steps, 233 s of evaluations, before training scored all nodes by one product (LOG.md), which changes
rounding alone. The seed also draws the codes.

Before prefixes scored as well, and codes competed only with those that may follow, seed 0 reached 0.0619 /
0.0351 (2026-11-23).
"""

from configs import common
from rec_jax.config import to_config_dict
from rec_jax.models.tiger import TigerConfig


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path, cfg.data.max_len = "beauty/Beauty.txt", 50
    cfg.semantic_ids.content, cfg.semantic_ids.max_shared = "beauty/Beauty_item2attributes.json", 0.95
    cfg.semantic_ids.method, cfg.semantic_ids.num_levels = "kmeans", 2
    cfg.model = to_config_dict(
        TigerConfig(width=128, ff_width=256, num_heads=4, dropout=0.2, prefix_embeddings=True, num_beams=30)
    )
    cfg.optim.learning_rate, cfg.optim.schedule, cfg.optim.warmup_steps = 2e-3, "cosine", 100
    cfg.train.epochs, cfg.train.eval_every_epochs = 12, 3.0
    cfg.train.batch_rows, cfg.train.micro_rows = 32, 2
    if variant == "smoke":  # of a simulated item, its interests are known
        cfg.semantic_ids.content, cfg.semantic_ids.method, cfg.semantic_ids.codebook_size = "", "rqvae", 8
        cfg.semantic_ids.content_dims = cfg.semantic_ids.width = cfg.semantic_ids.latent = 16
        cfg.semantic_ids.max_shared, cfg.semantic_ids.epochs, cfg.model.num_layers = 1.0, 30, 1
    return common.apply_variant(cfg, variant)
