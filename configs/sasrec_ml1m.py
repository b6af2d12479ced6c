"""SASRec with exact cross-entropy on MovieLens-1M."""

from configs import common


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path = "ml-1m/ml-1m.txt"
    cfg.data.format = "sasrec"
    cfg.data.max_len = 200
    return common.apply_variant(cfg, variant)
