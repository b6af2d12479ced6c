"""The one place where Flax NNX modules become plain pytrees and back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.nnx as nnx
import jax

ITEMS = ("items", "embedding")  # where a model keeps the table of its catalogue


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a static argument of jit
class Model:
    """A module's definition: `bind(params)` gives the module, at trace time only."""

    graphdef: Any
    abstract_params: Any

    def bind(self, params) -> nnx.Module:
        return nnx.merge(self.graphdef, nnx.State(params))


def define_model(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """The definition alone; computes nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    return Model(graphdef, jax.tree.map(_abstract, nnx.to_pure_dict(state)))


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def init_model(build: Callable[[nnx.Rngs], nnx.Module], seed: int) -> tuple[Model, dict]:
    """The definition and freshly initialised parameters, a plain nested dict of arrays."""

    def make(key):
        return nnx.to_pure_dict(nnx.split(build(nnx.Rngs(params=key)), nnx.Param)[1])

    return define_model(build), jax.jit(make)(jax.random.key(seed))


def without_table(params: dict) -> dict:
    """The parameters but for the table of items."""
    group, name = ITEMS
    return {**params, group: {k: v for k, v in params[group].items() if k != name}}


def with_table(params: dict, table) -> dict:
    group, name = ITEMS
    return {**params, group: {**params[group], name: table}}


def get_table(params: dict):
    group, name = ITEMS
    return params[group][name]
