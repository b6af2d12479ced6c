"""SASRec with exact cross-entropy on MovieLens-1M."""

from configs import common


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path, cfg.data.max_len = "ml-1m/ml-1m.txt", 200
    cfg.model.width = cfg.model.ff_width = 128
    cfg.model.num_heads = 2
    cfg.model.dropout = 0.3
    cfg.optim.learning_rate, cfg.optim.schedule, cfg.optim.warmup_steps = 1.5e-3, "cosine", 200
    cfg.train.epochs, cfg.train.eval_every_epochs = 24, 2.0
    cfg.train.batch_rows, cfg.train.micro_rows = 64, 4
    cfg.train.all_windows = True
    return common.apply_variant(cfg, variant)
