"""TIGER on Amazon Beauty (2014, 5-core): a model that writes the codes of the next item."""

from configs import common
from rec_jax.config import to_config_dict
from rec_jax.models.tiger import TigerConfig


def get_config(variant=None):
    cfg = common.base()
    cfg.data.path, cfg.data.max_len = "beauty/Beauty.txt", 50
    cfg.codes.content, cfg.codes.max_shared = "beauty/Beauty_item2attributes.json", 0.95
    cfg.model = to_config_dict(
        TigerConfig(width=128, ff_width=256, num_heads=4, num_layers=3, dropout=0.2, num_beams=30)
    )
    cfg.optim.learning_rate, cfg.optim.schedule, cfg.optim.warmup_steps = 1e-3, "cosine", 200
    cfg.train.epochs, cfg.train.eval_every_epochs = 40, 5.0
    cfg.train.batch_rows, cfg.train.micro_rows = 32, 8
    if variant == "smoke":
        cfg.codes.content, cfg.codes.num_codes, cfg.codes.num_levels, cfg.codes.epochs = "", 8, 2, 30
        cfg.codes.max_shared, cfg.codes.min_used = 1.0, 0.3
        cfg.codes.content_dims = cfg.codes.width = cfg.codes.latent = 16
        cfg.model.num_layers = 2
    return common.apply_variant(cfg, variant)
