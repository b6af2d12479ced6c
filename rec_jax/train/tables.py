"""Embedding tables in training: which are updated by touched rows, and how."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.nn.sharded import AXES, Placement, dedupe_physical, read_sharded, update_sharded
from rec_jax.nn.sparse import dedupe, gather_rows, scale_by_rowwise_rss, update_rows
from rec_jax.train.losses import LossConfig
from rec_jax.train.optim import OptimConfig, make_schedule

ITEMS = ("items", "embedding")  # where a model keeps the table of its catalogue


@dataclass(frozen=True)
class TableConfig:
    """How the table of items learns.

    optimizer: "dense" treats it like any parameter. The others touch only the rows of a batch, at a cost that
    does not grow with the catalogue; they need a sampled loss, for an exact softmax touches every row.
    layout: "replicated" keeps the whole table on every device, "rows" spreads its rows over the mesh.
    """

    optimizer: Literal["dense", "sgd", "adagrad", "rowwise_adagrad", "lazy_adam"] = "dense"
    learning_rate: float = 0.05  # of touched rows, by the schedule of optim
    layout: Literal["replicated", "rows"] = "replicated"
    capacity_factor: float = 1.0  # rows a device sends another at once, over an even share of its ids

    def __post_init__(self):
        for name in ("learning_rate", "capacity_factor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive (TableConfig)")
        if self.layout == "rows" and self.optimizer == "dense":
            raise ValueError(
                "layout='rows' is for tables that are updated by touched rows: choose an optimizer other "
                "than 'dense' (TableConfig)"
            )


def check(config: TableConfig, loss: LossConfig, optim: OptimConfig) -> None:
    """Raises ValueError for configs that do not go together."""
    if config.layout == "rows" and optim.clip_norm:
        raise ValueError(
            f"clip_norm={optim.clip_norm}: where layout='rows' the norm of the gradient is known only after "
            "the rows have been updated; use clip_norm=0 or layout='replicated' (TableConfig)"
        )
    if config.optimizer != "dense" and loss.type == "softmax":
        raise ValueError(
            f"optimizer={config.optimizer!r} touches the rows of a batch only, but loss.type='softmax' reads "
            "the whole catalogue: use a sampled loss, or optimizer='dense' (TableConfig)"
        )


def _make_optimizer(config: TableConfig, optim: OptimConfig, total_steps: int):
    scale = {
        "sgd": optax.identity(),
        "adagrad": optax.scale_by_rss(initial_accumulator_value=0.1, eps=optim.eps),
        "rowwise_adagrad": scale_by_rowwise_rss(optim.eps),
        "lazy_adam": optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
    }[config.optimizer]
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


def make_item_table(
    config: TableConfig, optim: OptimConfig, total_steps: int, num_rows: int, mesh: Mesh
) -> "ItemTable | None":
    """None where the table is updated like any parameter. num_rows: of the table, padding included."""
    if config.optimizer == "dense":
        return None
    optimizer = _make_optimizer(config, optim, total_steps)
    placement = Placement(num_rows) if config.layout == "rows" else None
    return ItemTable(optimizer, mesh, num_rows, placement, config.capacity_factor)


@dataclass(frozen=True)
class ItemTable:
    """The table of items where it is updated by touched rows, whole on each device or spread over the mesh.

    Ids that a method takes are those of the catalogue; rows_U are rows of the array, which a placement
    shuffles.
    """

    optimizer: optax.GradientTransformation
    mesh: Mesh
    num_rows: int  # padding included
    placement: Placement | None = None  # of rows that are spread
    capacity_factor: float = 1.0

    @property
    def spec(self) -> P:
        return P(AXES) if self.placement else P()

    @property
    def sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec)

    def place(self, table_VD) -> jax.Array:
        """The array on the mesh, of a table in the order of ids."""
        place = self.placement.place if self.placement else lambda table_VD: table_VD
        return jax.jit(place, out_shardings=self.sharding)(table_VD)

    def unplace(self, array_VD) -> jax.Array:
        """The table in the order of ids."""
        return self.placement.unplace(array_VD) if self.placement else array_VD

    def init(self, array_VD):
        """The state of the optimizer, its rows lying where those of the table do."""
        return jax.jit(self.optimizer.init, out_shardings=self.state_shardings(array_VD))(array_VD)

    def state_shardings(self, array_VD):
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self._state_specs(array_VD))

    def _state_specs(self, array_VD):
        state = jax.eval_shape(self.optimizer.init, array_VD)
        return jax.tree.map(lambda x: self.spec if x.ndim else P(), state)

    def _capacity(self, num_ids: int) -> int:
        """Rows that a device sends another in one round."""
        return max(1, math.ceil(self.capacity_factor * num_ids / self.mesh.size))

    def read(self, array_vD, ids: dict) -> tuple:
        """Inside a shard_map: a small table of what the ids of one device refer to.

        ids: int32 arrays, 0 = padding. Returns (rows at U distinct ids, padding first; the same arrays as
        places in those rows; rows_U; rounds of exchange with other devices).
        """
        flat_N, unravel = jax.flatten_util.ravel_pytree(ids)
        ids_N = jnp.concatenate([jnp.zeros(1, jnp.int32), flat_N])
        if self.placement is None:
            touched, rounds = dedupe(ids_N, self.num_rows), jnp.ones((), jnp.int32)
            rows_UD = gather_rows(array_vD, touched.rows_U)
        else:
            touched = dedupe_physical(self.placement, ids_N)
            rows_UD, rounds = read_sharded(array_vD, touched.rows_U, self._capacity(ids_N.size))
        return rows_UD, unravel(touched.place_N[1:]), touched.rows_U, rounds

    def sum_grads(self, rows_U, grads_UD) -> tuple[jax.Array, jax.Array]:
        """Inside a shard_map: rows and gradients as `update` wants them.

        Of a whole table these are the sums over all devices; spread rows are summed by their owners.
        """
        if self.placement is not None or self.mesh.shape["data"] == 1:
            return rows_U, grads_UD
        rows_N = jax.lax.all_gather(rows_U, "data", tiled=True)
        grads_ND = jax.lax.all_gather(grads_UD, "data", tiled=True)
        # The free places of all devices become one and the same id that is no row.
        touched = dedupe(jnp.minimum(rows_N, self.num_rows), self.num_rows)
        return touched.rows_U, jnp.zeros_like(grads_ND).at[touched.place_N].add(grads_ND)

    def update(self, array_VD, state, rows_U, grads_UD) -> tuple:
        """(array_VD, state, sum of the squared gradients) after one step of the optimizer."""
        if self.placement is None:
            rows_UD = gather_rows(array_VD, rows_U)
            updated = update_rows(self.optimizer, array_VD, state, rows_U, rows_UD, grads_UD)
            return *updated, jnp.sum(grads_UD**2)
        state_specs = self._state_specs(array_VD)
        return jax.shard_map(
            partial(self._update_spread, capacity=self._capacity(rows_U.size // self.mesh.shape["data"])),
            mesh=self.mesh,
            in_specs=(self.spec, state_specs, P("data"), P("data")),
            out_specs=(self.spec, state_specs, P()),
            check_vma=False,
        )(array_VD, state, rows_U, grads_UD)

    def _update_spread(self, array_vD, state, rows_U, grads_UD, *, capacity: int):
        return update_sharded(self.optimizer, array_vD, state, rows_U, grads_UD, capacity)
