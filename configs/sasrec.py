"""SASRec for a log of your own: --config.data.path=FILE. Stops when validation stops improving.

Small steps, so that a small log gets enough of them; the pages of MovieLens and Beauty show what to change
for a known data set.
"""

from configs import common


def get_config(variant=None):
    cfg = common.base()
    cfg.data.max_len = 100
    cfg.model.dropout = 0.3
    cfg.train.epochs, cfg.train.patience, cfg.train.eval_every_epochs = 200, 5, 2.0
    cfg.train.batch_rows, cfg.train.micro_rows = 16, 8
    return common.apply_variant(cfg, variant)
