"""The training state: all that a step reads and writes."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    step: jax.Array  # int32 scalar: steps taken
    params: Any  # nested dict of f32 arrays
    opt_state: Any
