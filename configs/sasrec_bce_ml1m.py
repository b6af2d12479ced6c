"""SASRec as published: binary cross-entropy with one negative, on MovieLens-1M."""

from configs import common


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path, cfg.data.format, cfg.data.max_len = "ml-1m/ml-1m.txt", "sasrec", 200
    cfg.model.width = cfg.model.ff_width = 50
    cfg.model.norm = "original"
    cfg.model.dropout = 0.2
    cfg.loss.type = "bce"
    cfg.loss.num_negatives, cfg.loss.sharing = 1, "position"
    cfg.loss.exclude_history = True
    cfg.train.epochs = 250
    cfg.train.eval_every_epochs = 10.0
    return common.apply_variant(cfg, variant)
