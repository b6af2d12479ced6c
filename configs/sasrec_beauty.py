"""SASRec with sampled softmax on Amazon Beauty (2014, 5-core)."""

from configs import common


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path, cfg.data.format, cfg.data.max_len = "beauty/Beauty.txt", "sequences", 50
    cfg.model.width = cfg.model.ff_width = 256
    cfg.model.num_layers, cfg.model.dropout = 1, 0.2
    cfg.loss.type, cfg.loss.num_negatives = "sampled_softmax", 256
    cfg.train.batch_rows, cfg.train.micro_rows = 16, 8
    return common.apply_variant(cfg, variant)
