"""Embedding tables in training: which are updated by touched rows, and how."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rec_jax.nn.layouts import DimSharded, Read, Replicated, RowSharded
from rec_jax.nn.sharded import Placement
from rec_jax.nn.sparse import RowOptimizer, catch_up_adam, scale_by_rowwise_rss
from rec_jax.train.losses import LossConfig
from rec_jax.train.optim import OptimConfig, make_optimizer, make_schedule


@dataclass(frozen=True)
class TableConfig:
    """How the table of items learns and lies.

    optimizer: "dense" treats it like any parameter. The others touch only the rows of a batch, at a cost that
    does not grow with the catalogue; they need a sampled loss, for an exact softmax touches every row.
    "catch_up_adam" makes up for the steps that "lazy_adam" leaves out.
    layout: "replicated" keeps the whole table on every device, "rows" spreads its rows over the mesh, "dims"
    its dims over mesh.model; "auto" is what `python -m experiments.plan` says.
    """

    optimizer: Literal["dense", "sgd", "adagrad", "rowwise_adagrad", "lazy_adam", "catch_up_adam"] = "dense"
    learning_rate: float = 0.05  # of touched rows, by the schedule of optim
    weight_decay: float = 0.0  # decoupled, of the touched rows of each step
    layout: Literal["auto", "replicated", "rows", "dims"] = "auto"
    capacity_factor: float = 1.0  # rows a device sends another at once, over an even share of its ids
    device_gbytes: float = 8.0  # what table and optimizer may take of a device, for layout="auto"

    def __post_init__(self):
        for name in ("learning_rate", "capacity_factor", "device_gbytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive (TableConfig)")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative (TableConfig)")
        if self.weight_decay and self.optimizer in ("dense", "catch_up_adam"):
            raise ValueError(
                f"weight_decay={self.weight_decay} is not for optimizer={self.optimizer!r}: use "
                "optim.weight_decay for 'dense', or another optimizer of touched rows (TableConfig)"
            )
        if self.optimizer == "dense" and self.layout == "dims":
            raise ValueError(
                f"layout={self.layout!r} is for tables that are updated by touched rows: choose an optimizer "
                "other than 'dense', or layout='rows' (TableConfig)"
            )


def check(config: TableConfig, loss: LossConfig) -> None:
    """Raises ValueError for configs that do not go together."""
    if config.optimizer != "dense" and loss.type == "softmax":
        raise ValueError(
            f"table.optimizer={config.optimizer!r} touches the rows of a batch only, but loss.type='softmax' "
            "reads the whole catalogue: use a sampled loss, or table.optimizer='dense' (TableConfig)"
        )
    if config.optimizer == "dense" and config.layout == "rows" and loss.type != "softmax":
        raise ValueError(
            f"table.layout='rows' with table.optimizer='dense' is for loss.type='softmax', not "
            f"{loss.type!r}: a sampled loss goes with an optimizer of touched rows (TableConfig)"
        )


def _make_optimizer(config: TableConfig, optim: OptimConfig, total_steps: int):
    if config.optimizer == "dense":
        return make_optimizer(dataclasses.replace(optim, weight_decay=0.0), {}, total_steps)
    rates = dataclasses.replace(optim, learning_rate=config.learning_rate)
    schedule = make_schedule(rates, total_steps)
    if config.optimizer == "catch_up_adam":
        return catch_up_adam(schedule, optim.b1, optim.b2, optim.eps)
    scale = {
        "sgd": optax.identity(),
        "adagrad": optax.scale_by_rss(initial_accumulator_value=0.1, eps=optim.eps),
        "rowwise_adagrad": scale_by_rowwise_rss(optim.eps, "model" if config.layout == "dims" else None),
        "lazy_adam": optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
    }[config.optimizer]
    # A decay by 0 would still gather the rows to look at them.
    decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
    return optax.chain(scale, *decay, optax.scale_by_learning_rate(schedule))


def make_item_table(
    config: TableConfig, optim: OptimConfig, total_steps: int, item_counts: np.ndarray, mesh: Mesh
) -> "ItemTable | None":
    """None where the table is like any other parameter. item_counts: int[V + 1] training events of each
    row."""
    num_rows = len(item_counts)
    if config.optimizer == "dense" and config.layout == "replicated":
        return None
    if config.layout == "rows":
        layout = RowSharded(num_rows, mesh, config.capacity_factor)
    else:
        layout = {"replicated": Replicated, "dims": DimSharded}[config.layout](num_rows, mesh)
    return ItemTable(layout, _make_optimizer(config, optim, total_steps), config.optimizer == "dense")


@dataclass(frozen=True)
class ItemTable:
    """The table of items: where it lies and what updates it.

    is_dense: every row at every step, for a softmax over the whole catalogue.
    """

    layout: Replicated
    optimizer: optax.GradientTransformation | RowOptimizer
    is_dense: bool

    @property
    def placement(self) -> Placement | None:
        return self.layout.placement if isinstance(self.layout, RowSharded) else None

    def read(self, array, state, ids: dict) -> tuple[Read, dict]:
        """Inside a shard_map: what the ids of one device refer to, and the same arrays of ids as places in
        it.

        ids: int32 arrays, 0 = padding.
        """
        ids_N, unravel = _ravel(ids)
        read = self.layout.read(None if self.is_dense else self.optimizer, array, state, ids_N)
        return read, unravel(read.place_N[1:])

    def update_dense(self, array_vD, state, grads_vD) -> tuple:
        updates_vD, state = self.optimizer.update(grads_vD, state, array_vD)
        return optax.apply_updates(array_vD, updates_vD), state


def _ravel(ids: dict) -> tuple:
    """All ids after a 0, for padding must be among them, and the way back to arrays without it."""
    flat_N, unravel = jax.flatten_util.ravel_pytree(ids)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), flat_N]), unravel
