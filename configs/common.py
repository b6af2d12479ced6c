"""What every config file starts from."""

from ml_collections import ConfigDict

from rec_jax.config import to_config_dict
from rec_jax.run_config import ExperimentConfig


def base() -> ConfigDict:
    """Every key there is, at its default; a config file changes what differs."""
    return to_config_dict(ExperimentConfig())


def apply_variant(cfg: ConfigDict, variant: str | None) -> ConfigDict:
    """`:smoke` makes any config run in seconds on a CPU, on simulated data."""
    if variant in (None, ""):
        return cfg
    if variant != "smoke":
        raise ValueError(f"variant {variant!r} is unknown: use :smoke, or nothing")
    cfg.data.format, cfg.data.path, cfg.data.max_len = "simulator", "", 16
    cfg.data.titles, cfg.data.titles_ids = "", ""
    cfg.data.sim.num_items, cfg.data.sim.num_users = 60, 300
    cfg.data.sim.num_interests, cfg.data.sim.mean_len = 4, 12
    small = {"width": 16, "ff_width": 16, "num_heads": 1, "dropout": 0.1}
    cfg.model.update({name: value for name, value in small.items() if name in cfg.model})
    if "num_negatives" in cfg.loss:
        cfg.loss.num_negatives = min(cfg.loss.num_negatives, 8)
    cfg.optim.learning_rate, cfg.optim.warmup_steps = 1e-2, 5
    cfg.train.epochs, cfg.train.eval_every_epochs = 20, 5.0
    cfg.train.batch_rows, cfg.train.micro_rows = 32, 4
    cfg.train.log_every_steps, cfg.train.checkpoint_every_steps = 5, 20
    cfg.eval.filter_seen, cfg.eval.bootstrap = False, 100
    cfg.eval.sampled_negatives = min(cfg.eval.sampled_negatives, 10)
    return cfg
