"""The one place where Flax NNX modules become plain pytrees and back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.nnx as nnx
import jax


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a static argument of jit
class Model:
    """A module's definition: `bind(params)` gives the module, at trace time only."""

    graphdef: Any
    abstract_params: Any

    def bind(self, params) -> nnx.Module:
        return nnx.merge(self.graphdef, nnx.State(params))


def init_model(build: Callable[[nnx.Rngs], nnx.Module], seed: int) -> tuple[Model, dict]:
    """Returns the definition and freshly initialised parameters, a plain nested dict of arrays."""

    def make(key):
        return nnx.split(build(nnx.Rngs(params=key)), nnx.Param)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    params = jax.jit(lambda key: nnx.to_pure_dict(make(key)[1]))(jax.random.key(seed))
    return Model(graphdef, jax.eval_shape(lambda: params)), params
