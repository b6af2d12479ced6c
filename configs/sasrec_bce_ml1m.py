"""SASRec as published: binary cross-entropy with one negative, on MovieLens-1M."""

from configs import common


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path, cfg.data.max_len = "ml-1m/ml-1m.txt", 200
    cfg.model.width = cfg.model.ff_width = 50
    cfg.model.norm = "original"
    cfg.model.dropout = 0.2
    cfg.loss.type = "bce"
    cfg.loss.num_negatives, cfg.loss.sharing = 1, "position"
    cfg.loss.exclude_history = True
    cfg.optim.learning_rate, cfg.optim.schedule, cfg.optim.warmup_steps = 2e-3, "cosine", 200
    cfg.train.epochs, cfg.train.eval_every_epochs = 60, 5.0
    cfg.train.all_windows = True
    cfg.train.batch_rows, cfg.train.micro_rows = 32, 4
    cfg.eval.sampled_negatives = 100  # the paper's protocol, beside the full ranking
    return common.apply_variant(cfg, variant)
