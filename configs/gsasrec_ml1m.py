"""gSASRec: generalised binary cross-entropy against many negatives, on MovieLens-1M."""

from configs import common


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path, cfg.data.max_len = "ml-1m/ml-1m.txt", 200
    cfg.model.width = cfg.model.ff_width = 128
    cfg.model.num_heads, cfg.model.dropout = 2, 0.3
    cfg.loss.type = "gbce"
    cfg.loss.num_negatives, cfg.loss.gbce_t = 256, 0.75
    cfg.optim.learning_rate, cfg.optim.schedule, cfg.optim.warmup_steps = 1.5e-3, "cosine", 200
    cfg.train.epochs, cfg.train.eval_every_epochs = 24, 3.0
    cfg.train.all_windows = True
    cfg.train.batch_rows, cfg.train.micro_rows = 32, 4
    return common.apply_variant(cfg, variant)
