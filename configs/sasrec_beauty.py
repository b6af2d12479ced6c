"""SASRec with sampled softmax on Amazon Beauty (2014, 5-core)."""

from configs import common


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path, cfg.data.max_len = "beauty/Beauty.txt", 50
    cfg.model.width = cfg.model.ff_width = 256
    cfg.model.num_layers, cfg.model.norm, cfg.model.dropout = 1, "pre", 0.5
    cfg.loss.type, cfg.loss.num_negatives = "sampled_softmax", 256
    cfg.optim.learning_rate, cfg.optim.schedule, cfg.optim.warmup_steps = 1e-3, "cosine", 100
    cfg.train.epochs, cfg.train.eval_every_epochs = 24, 3.0
    cfg.train.batch_rows, cfg.train.micro_rows = 32, 16
    return common.apply_variant(cfg, variant)
