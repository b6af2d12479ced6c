"""gSASRec: generalised binary cross-entropy against many negatives, on MovieLens-1M."""

from configs import common


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path, cfg.data.format, cfg.data.max_len = "ml-1m/ml-1m.txt", "sasrec", 200
    cfg.model.width = cfg.model.ff_width = 128
    cfg.model.dropout = 0.5
    cfg.loss.type = "gbce"
    cfg.loss.num_negatives, cfg.loss.gbce_t = 256, 0.75
    return common.apply_variant(cfg, variant)
