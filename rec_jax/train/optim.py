"""Optimizers and learning rate schedules from a config."""

from dataclasses import dataclass
from typing import Literal

import optax

from rec_jax.tree import leaf_mask


@dataclass(frozen=True)
class OptimConfig:
    type: Literal["adamw", "adam", "sgd", "adagrad"] = "adam"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    final_rate: float = 0.0  # last learning rate of a decaying schedule, as a share of learning_rate
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    clip_norm: float = 0.0  # largest global norm of the gradient; 0 = off
    weight_decay: float = 0.0  # decoupled, for "adamw"
    weight_decay_names: str = r".*kernel"  # regex of the parameter names that decay

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive (OptimConfig)")
        for name in ("warmup_steps", "final_rate", "clip_norm", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative (OptimConfig)")
        if self.weight_decay and self.type != "adamw":
            raise ValueError(
                f"weight_decay={self.weight_decay} needs type='adamw', not {self.type!r} (OptimConfig)"
            )


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Returns the function step -> learning rate, with a linear warm-up from 0."""
    peak, warmup = config.learning_rate, config.warmup_steps
    decay_steps = max(1, total_steps - warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_rate)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.final_rate, decay_steps)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: OptimConfig, params, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer without gradient clipping, which `TrainStep` does. params: only their names are
    read, for weight decay.

    Raises ValueError if weight decay is on and its regex matches no name.
    """
    chain = []
    if config.type in ("adam", "adamw"):
        chain.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    elif config.type == "adagrad":
        chain.append(optax.scale_by_rss(initial_accumulator_value=0.1, eps=config.eps))
    if config.weight_decay:
        mask = leaf_mask(params, config.weight_decay_names, field="weight_decay_names")
        chain.append(optax.add_decayed_weights(config.weight_decay, mask))
    chain.append(optax.scale_by_learning_rate(make_schedule(config, total_steps)))
    return optax.chain(*chain)
