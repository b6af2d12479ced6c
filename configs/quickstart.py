"""A small SASRec on a simulated world whose best possible predictor is known.

What the README's first command runs. Nothing is downloaded.
"""

from configs import common


def get_config(variant=None):
    cfg = common.base()
    cfg.data.format = "simulator"
    cfg.data.max_len = 64
    cfg.model.width = cfg.model.ff_width = 64
    cfg.model.dropout = 0.1
    cfg.optim.learning_rate = 3e-3
    cfg.optim.schedule = "cosine"
    cfg.optim.warmup_steps = 50
    cfg.train.epochs = 12
    cfg.train.batch_rows, cfg.train.micro_rows = 64, 8
    cfg.eval.filter_seen = False
    return common.apply_variant(cfg, variant)
