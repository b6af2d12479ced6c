"""The optimizers and layouts of embedding tables, from a config."""

from dataclasses import dataclass
from typing import Literal

import optax
from jax.sharding import Mesh

from rec_jax.tables.layouts import DimSharded, Replicated, RowSharded
from rec_jax.tables.sparse import catch_up_adam, scale_by_rowwise_rss
from rec_jax.tables.tables import Table, Tables


@dataclass(frozen=True)
class TableConfig:
    """The optimizer and the layout of all embedding tables of a model.

    optimizer: "dense" updates tables like any parameter. The others are a sparse update of the entries that a
    batch reads, at a cost that does not grow with the catalogue; they need a sampled loss, because an exact
    softmax reads every entry. "catch_up_adam" makes up for the steps that "lazy_adam" leaves out.
    layout: "replicated" keeps the whole table on every device, "rows" shards its rows over the mesh, "dims"
    shards its dims over mesh.model; "auto" chooses, and `python -m experiments.plan` shows how.
    """

    optimizer: Literal["dense", "sgd", "adagrad", "rowwise_adagrad", "lazy_adam", "catch_up_adam"] = "dense"
    learning_rate: float = 0.05  # of sparse updates; follows the schedule of optim
    weight_decay: float = 0.0  # decoupled; applies to the entries read
    layout: Literal["auto", "replicated", "rows", "dims"] = "auto"
    capacity_factor: float = 1.0  # entries sent to a device per round, as a multiple of an even share
    device_gbytes: float = 8.0  # memory per device for a table and its optimizer state, for layout="auto"

    def __post_init__(self):
        for name in ("learning_rate", "capacity_factor", "device_gbytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive (TableConfig)")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative (TableConfig)")
        if self.weight_decay and self.optimizer in ("dense", "catch_up_adam"):
            raise ValueError(
                f"weight_decay={self.weight_decay} is not supported with optimizer={self.optimizer!r}: set "
                "optim.weight_decay for 'dense', or choose another sparse optimizer (TableConfig)"
            )
        if self.optimizer == "dense" and self.layout == "dims":
            raise ValueError(
                f"layout={self.layout!r} is not supported with optimizer='dense': choose another optimizer "
                "or layout='rows' (TableConfig)"
            )

    @property
    def is_plain(self) -> bool:
        """Whether tables are plain parameters."""
        return self.optimizer == "dense" and self.layout == "replicated"


def _sparse_optimizer(config: TableConfig, schedule: optax.Schedule, optim):
    if config.optimizer == "catch_up_adam":
        return catch_up_adam(schedule, optim.b1, optim.b2, optim.eps)
    scale = {
        "sgd": optax.identity(),
        "adagrad": optax.scale_by_rss(initial_accumulator_value=0.1, eps=optim.eps),
        "rowwise_adagrad": scale_by_rowwise_rss(optim.eps, "model" if config.layout == "dims" else None),
        "lazy_adam": optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
    }[config.optimizer]
    # A decay of 0 would still gather the entries.
    decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
    return optax.chain(scale, *decay, optax.scale_by_learning_rate(schedule))


def make_tables(
    config: TableConfig, named: dict[str, tuple[str, int]], mesh: Mesh, schedule, optim, dense
) -> Tables:
    """Returns the tables that are not plain parameters; none if config.is_plain.

    config: its layout must not be "auto". named: {table: (path of its parameter, number of rows)}. schedule:
    the learning rate of sparse updates by step. optim: an OptimConfig, for b1, b2 and eps. dense: the optax
    transformation of dense tables.
    """
    if config.is_plain:
        return Tables({})
    optimizer = dense if config.optimizer == "dense" else _sparse_optimizer(config, schedule, optim)
    made = {}
    for name, (path, num_rows) in named.items():
        if config.layout == "rows":
            layout = RowSharded(num_rows, mesh, config.capacity_factor)
        else:
            layout = {"replicated": Replicated, "dims": DimSharded}[config.layout](num_rows, mesh)
        made[name] = Table(path, layout, optimizer, is_dense=config.optimizer == "dense")
    return Tables(made)
