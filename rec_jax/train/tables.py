"""Embedding tables in training: which are updated by touched rows, and how."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from rec_jax.nn.sparse import dedupe, read_rows, scale_by_rowwise_rss
from rec_jax.train.losses import LossConfig
from rec_jax.train.optim import OptimConfig, make_schedule

ITEMS = ("items", "embedding")  # where a model keeps the table of its catalogue


@dataclass(frozen=True)
class TableConfig:
    """How the table of items learns.

    update: "dense" treats it like any parameter. The others touch only the rows of a batch, at a cost that
    does not grow with the catalogue; they need a sampled loss, for an exact softmax touches every row.
    """

    update: Literal["dense", "sgd", "adagrad", "rowwise_adagrad", "lazy_adam"] = "dense"
    learning_rate: float = 0.05  # of touched rows, by the schedule of optim

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive (TableConfig)")


def check(config: TableConfig, loss: LossConfig) -> None:
    if config.update != "dense" and loss.type == "softmax":
        raise ValueError(
            f"update={config.update!r} touches the rows of a batch only, but loss.type='softmax' reads the "
            "whole catalogue: use a sampled loss, or update='dense' (TableConfig)"
        )


def make_row_optimizer(
    config: TableConfig, optim: OptimConfig, total_steps: int
) -> optax.GradientTransformation | None:
    """The optimizer of touched rows; None where the table is updated like any parameter."""
    if config.update == "dense":
        return None
    scale = {
        "sgd": optax.identity(),
        "adagrad": optax.scale_by_rss(initial_accumulator_value=0.1, eps=optim.eps),
        "rowwise_adagrad": scale_by_rowwise_rss(optim.eps),
        "lazy_adam": optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
    }[config.update]
    schedule = make_schedule(dataclasses.replace(optim, learning_rate=config.learning_rate), total_steps)
    return optax.chain(scale, optax.scale_by_learning_rate(schedule))


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


def compact(table_VD, ids: dict) -> tuple[jax.Array, dict, jax.Array]:
    """A small table of what a batch refers to.

    ids: int32 arrays of ids of the table, 0 = padding. Returns (its rows at U distinct ids, padding first;
    the same arrays as places in those rows; rows_U).
    """
    flat_N, unravel = jax.flatten_util.ravel_pytree(ids)
    touched = dedupe(jnp.concatenate([jnp.zeros(1, jnp.int32), flat_N]), table_VD.shape[0])
    return read_rows(table_VD, touched.rows_U), unravel(touched.place_N[1:]), touched.rows_U


def sum_rows(rows_U, grads_UD, num_rows: int, axis: str) -> tuple[jax.Array, jax.Array]:
    """Rows and gradients of all devices of a mesh axis, each of which has touched rows of its own."""
    rows_N = jax.lax.all_gather(rows_U, axis, tiled=True)
    grads_ND = jax.lax.all_gather(grads_UD, axis, tiled=True)
    # The free places of all devices become one and the same id that is no row.
    touched = dedupe(jnp.minimum(rows_N, num_rows), num_rows)
    return touched.rows_U, jnp.zeros_like(grads_ND).at[touched.place_N].add(grads_ND)
