"""Generative retrieval as in TIGER on Amazon Beauty (2014, 5-core): predicts the next item's semantic id.

Paper: Rajput et al., NeurIPS'23 (arXiv 2305.05065); 0.0648 (Recall@10) and 0.0384 (NDCG@10) on this split.
Differs: semantic ids are made from an item's brand and category alone (`Beauty_item2attributes.json`; the
paper embeds title, price, brand and category with Sentence-T5), in two levels by residual k-means. With these
two levels 92 % of the items share their codes with others, up to 202; a third level numbers the items that
share them, the most frequent in training first. To distinguish such items, every prefix of a semantic id has
an embedding of its own (`model.prefix_embeddings`), used as input and for scoring; the last prefix is the
item itself. A causal transformer instead of an encoder and a decoder; see rec_jax/models/tiger.py.
Protocol: leave-one-out, full-catalogue ranking (12,101 items) of the 30 items that a beam search finds, seen
items filtered, checkpoint selected on validation NDCG@10. Data: one `user item item ...` line per user.

    python -m experiments.train --config=configs/tiger_beauty.py --workdir=runs/tiger_beauty

An item takes Q tokens, so attention's softmax costs Q * Q times that of SASRec, which no count of
multiply-adds includes: a training step takes 1.54 times as long as SASRec's at equal multiply-adds
(`experiments.benchmark --suite=models`). A search with 50 beams for the next items after 50 events, in 10,000
items, takes 14.5 ms (`--suite=beam`; both 2026-11-27, one busy core of an Intel Xeon).

Measured 2026-11-27 on one busy core of an Intel Xeon (AVX-512), seeds 0 and 1: test HR@10 0.0777 and 0.0769,
mean 0.0773; NDCG@10 0.0440 and 0.0445, mean 0.0443 (95 % intervals 0.0421 to 0.0464 and 0.0423 to 0.0468);
unfiltered 0.0691 / 0.0365 and 0.0681 / 0.0376; validation NDCG@10 0.0597 and 0.0610. Seed 0: 238 s of
training steps, 233 s of evaluation; since then training scores all trie nodes by one product (LOG.md), which
changes rounding only. The seed also decides the semantic ids.

When prefix embeddings were not used for scoring, and a code competed with all codes of its level instead of
those that may follow, seed 0 reached 0.0619 / 0.0351 (2026-11-23).
"""

from configs import common
from rec_jax.config import to_config_dict
from rec_jax.models.tiger import TigerConfig


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path = "beauty/Beauty.txt"
    cfg.data.max_len = 50
    cfg.semantic_ids.content = "beauty/Beauty_item2attributes.json"
    cfg.semantic_ids.method = "kmeans"
    cfg.semantic_ids.num_levels = 2
    cfg.semantic_ids.max_shared = 0.95
    cfg.model = to_config_dict(TigerConfig())
    cfg.model.width = 128
    cfg.model.ff_width = 256
    cfg.model.num_heads = 4
    cfg.model.dropout = 0.2
    cfg.model.prefix_embeddings = True
    cfg.model.num_beams = 30
    cfg.optim.learning_rate = 2e-3
    cfg.optim.schedule = "cosine"
    cfg.optim.warmup_steps = 100
    cfg.train.epochs = 12
    cfg.train.eval_every_epochs = 3.0
    cfg.train.batch_rows = 32
    cfg.train.micro_rows = 2
    return common.apply_variant(cfg, variant)
