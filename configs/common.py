"""Where every config file starts from."""

from ml_collections import ConfigDict

from rec_jax.config import to_config_dict
from rec_jax.models.registry import MODELS
from rec_jax.run_config import ExperimentConfig

MODEL_CONFIGS = {config.type: config for config in MODELS}


def base() -> ConfigDict:
    """All keys at their defaults; a config file sets those that differ."""
    return to_config_dict(ExperimentConfig())


def split_variant(variant: str | None) -> tuple[str, str]:
    """Returns (model type, "smoke" or "") for a config file whose variants are MODEL and MODEL-smoke.

    Without a model, "sasrec". Raises ValueError for an unknown one.
    """
    name, _, smoke = (variant or "").partition("-")
    if name == "smoke":
        name, smoke = "", "smoke"
    name = name or "sasrec"
    if name not in MODEL_CONFIGS:
        raise ValueError(f"variant {variant!r}: unknown model {name!r}; use {', '.join(MODEL_CONFIGS)}")
    return name, smoke


def apply_variant(cfg: ConfigDict, variant: str | None) -> ConfigDict:
    """`:smoke` makes any config run in seconds on a CPU, on simulated data."""
    if not variant:
        return cfg
    if variant != "smoke":
        raise ValueError(f"unknown variant {variant!r}: use :smoke, or none")
    cfg.data.format = "simulator"
    cfg.data.path = ""
    cfg.data.titles = ""
    cfg.data.titles_ids = ""
    cfg.data.max_len = 16
    cfg.data.sim.num_items = 60
    cfg.data.sim.num_users = 300
    cfg.data.sim.num_interests = 4
    cfg.data.sim.mean_len = 12
    small = {"width": 16, "ff_width": 16, "num_heads": 1, "dropout": 0.1}
    cfg.model.update({key: value for key, value in small.items() if key in cfg.model})
    cfg.model.num_layers = min(cfg.model.num_layers, 2)
    cfg.semantic_ids.content = ""  # an item's interests in the simulated log
    cfg.semantic_ids.content_dims = 16
    cfg.semantic_ids.codebook_size = 0
    cfg.semantic_ids.max_shared = 1.0
    cfg.semantic_ids.epochs = 30
    cfg.semantic_ids.width = 16
    cfg.semantic_ids.latent = 16
    if "num_negatives" in cfg.loss:
        cfg.loss.num_negatives = min(cfg.loss.num_negatives, 8)
    cfg.optim.learning_rate = 1e-2
    cfg.optim.warmup_steps = 5
    cfg.train.epochs = 20
    cfg.train.eval_every_epochs = 5.0
    cfg.train.batch_rows = 32
    cfg.train.micro_rows = 4
    cfg.train.log_every_steps = 5
    cfg.train.checkpoint_every_steps = 20
    cfg.eval.filter_seen = False
    cfg.eval.bootstrap = 100
    cfg.eval.sampled_negatives = min(cfg.eval.sampled_negatives, 10)
    return cfg
