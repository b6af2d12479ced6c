"""Where a table lies on a mesh with the axes "data" and "model", and how its rows are read and updated.

A batch is split over "data" and whole on every device of "model". Four layouts of one interface:

    Replicated   every device has the whole table
    RowSharded   rows are spread over all devices; distinct ids, rows and gradients are exchanged
    DimSharded   each device of "model" has some of the dims of all rows
    HotCold      the most frequent rows replicated, the others spread

`place`, `unplace` and `init` work on whole arrays, all other methods inside a shard_map over both axes, on
what one device has. An update has two halves, so that a caller can scale the gradients in between:

    read = layout.read(optimizer, arrays, state, ids_N)
    read.rows_UD[read.place_N]                                       the lookup
    touched, grads = layout.sum_grads(read.touched, grads_UD)        of read.rows_UD
    arrays, state, squares = layout.update(optimizer, arrays, state, touched, grads)
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.nn import sharded
from rec_jax.nn.sharded import AXES, NUM_GROUPS, Placement
from rec_jax.nn.sparse import Touched, find_rows, host_dedupe, is_rows, read_rows, update_rows


class Read(NamedTuple):
    """What one device has read. Id 0, padding, must be among the ids; its place is 0."""

    rows_UD: jax.Array
    place_N: jax.Array  # int32[N]: rows_UD[place_N] are the rows of the ids
    touched: Any  # which rows these are, for `sum_grads`
    rounds: jax.Array  # int32 scalar: exchanges with other devices, more than 1 where ids exceeded a capacity


@dataclass(frozen=True)
class Replicated:
    num_rows: int  # padding included
    mesh: Mesh

    @property
    def spec(self) -> P:
        return P()

    def state_specs(self, state):
        """Of the optimizer's state, like `spec` of the arrays."""
        return _specs_like(state, self.spec)

    def place(self, table_VD):
        """The arrays on the mesh, of a table in the order of ids."""
        if len(table_VD) != self.num_rows:
            raise ValueError(f"a table of {len(table_VD)} rows must have num_rows={self.num_rows}")
        return jax.jit(self.arrange, out_shardings=shardings(self.mesh, self.spec))(table_VD)

    def init(self, optimizer, arrays):
        """The state of the optimizer, its rows lying where those of the table do."""
        specs = self.state_specs(jax.eval_shape(self.init_state(optimizer), arrays))
        return jax.jit(self.init_state(optimizer), out_shardings=shardings(self.mesh, specs))(arrays)

    def init_state(self, optimizer):
        return optimizer.init

    def arrange(self, table_VD):
        """What `place` puts on the mesh."""
        return table_VD

    def unplace(self, arrays) -> jax.Array:
        """The table in the order of ids."""
        return arrays

    def catch_up(self, optimizer, arrays, state) -> tuple:
        """(arrays, state) with all made up for that rows have missed: before a table is read as a whole."""
        updates, state = optimizer.missed(state)
        return arrays + updates, state

    def read(self, optimizer, table_VD, state, ids_N, touched: Touched | None = None) -> Read:
        """touched: from `host_dedupe`, where the host has done it."""
        touched = find_rows(ids_N, self.num_rows) if touched is None else touched
        rows_UD = read_rows(optimizer, table_VD, state, touched.rows_U)
        return Read(rows_UD, touched.place_N, touched.rows_U, jnp.ones((), jnp.int32))

    def host_dedupe(self, ids_N: np.ndarray) -> Touched:
        """What `read` would find itself, by NumPy."""
        return host_dedupe(ids_N, self.num_rows)

    def sum_grads(self, rows_U, grads_UD) -> tuple:
        """Sums over all devices: distinct rows, and their gradients."""
        if self.mesh.shape["data"] == 1:
            return rows_U, grads_UD
        rows_N = jax.lax.all_gather(rows_U, "data", tiled=True)
        grads_ND = jax.lax.all_gather(grads_UD, "data", tiled=True)
        # The free places of all devices become one and the same id that is no row.
        touched = find_rows(jnp.minimum(rows_N, self.num_rows), self.num_rows)
        return touched.rows_U, jnp.zeros_like(grads_ND).at[touched.place_N].add(grads_ND)

    def sum_squares(self, rows_U, grads_UD) -> jax.Array:
        return jnp.sum(grads_UD**2)

    def update(self, optimizer, table_VD, state, rows_U, grads_UD) -> tuple:
        """(arrays, state, sum of the squared gradients) after one step of the optimizer."""
        updated = update_rows(optimizer, table_VD, state, rows_U, grads_UD)
        return *updated, self.sum_squares(rows_U, grads_UD)


@dataclass(frozen=True)
class DimSharded(Replicated):
    """An optimizer that sums over the dims of a row must know that they are split over "model"."""

    @property
    def spec(self) -> P:
        return P(None, "model")

    def arrange(self, table_VD):
        parts = self.mesh.shape["model"]
        if table_VD.shape[1] % parts:
            raise ValueError(
                f"layout='dims' splits {table_VD.shape[1]} dims over mesh.model={parts}, which must divide "
                "them"
            )
        return table_VD

    def read(self, optimizer, table_Vd, state, ids_N, touched: Touched | None = None) -> Read:
        part = super().read(optimizer, table_Vd, state, ids_N, touched)
        return part._replace(rows_UD=jax.lax.all_gather(part.rows_UD, "model", axis=1, tiled=True))

    def sum_grads(self, rows_U, grads_UD) -> tuple:
        dim = grads_UD.shape[1] // jax.lax.axis_size("model")
        grads_Ud = jax.lax.dynamic_slice_in_dim(grads_UD, jax.lax.axis_index("model") * dim, dim, axis=1)
        return super().sum_grads(rows_U, grads_Ud)

    def sum_squares(self, rows_U, grads_Ud) -> jax.Array:
        return jax.lax.psum(jnp.sum(grads_Ud**2), "model")


@dataclass(frozen=True)
class RowSharded(Replicated):
    capacity_factor: float = 1.0  # rows a device sends another at once, over an even share of its ids

    def __post_init__(self):
        if NUM_GROUPS % self.mesh.size:
            raise ValueError(
                f"rows are spread over mesh.data * mesh.model = {self.mesh.size} devices, which must divide "
                f"{NUM_GROUPS}: use a power of two, or another table.layout"
            )

    @property
    def placement(self) -> Placement:
        return Placement(self.num_rows)

    @property
    def spec(self) -> P:
        return P(AXES)

    def arrange(self, table_VD):
        return self.placement.place(table_VD)

    def spread(self, arrays) -> jax.Array:
        """One array of all rows, placed and spread, for those who score with it."""
        return arrays

    def unplace(self, arrays) -> jax.Array:
        return self.placement.unplace(self.spread(arrays))

    @property
    def _local_rows(self) -> int:
        return self.placement.size // self.mesh.size

    def _capacity(self, num_ids: int) -> int:
        return max(1, math.ceil(self.capacity_factor * num_ids / self.mesh.size))

    def host_dedupe(self, ids_N: np.ndarray) -> Touched:
        return host_dedupe(np.asarray(self.placement.to_physical(ids_N)), self.placement.size)

    def read(self, optimizer, table_vD, state, ids_N, touched: Touched | None = None) -> Read:
        if touched is None:
            touched = sharded.dedupe_physical(self.placement, ids_N)
        rows_UD, rounds = sharded.read_sharded(
            optimizer, table_vD, state, touched.rows_U, self._capacity(ids_N.size)
        )
        return Read(rows_UD, touched.place_N, touched.rows_U, rounds)

    def sum_grads(self, rows_U, grads_UD) -> tuple:
        """As they are: it is the owners of rows who sum."""
        return rows_U, grads_UD

    def sum_squares(self, rows_U, grads_UD) -> jax.Array:
        return sharded.sum_squares_sharded(rows_U, grads_UD, self._local_rows, self._capacity(rows_U.size))

    def update(self, optimizer, table_vD, state, rows_U, grads_UD) -> tuple:
        return sharded.update_sharded(
            optimizer, table_vD, state, rows_U, grads_UD, self._capacity(rows_U.size)
        )

    def scatter(self, rows_U, grads_UD) -> jax.Array:
        """f32[local rows, D]: the gradient of all local rows."""
        return sharded.scatter_sharded(rows_U, grads_UD, self._local_rows, self._capacity(rows_U.size))


@dataclass(frozen=True, eq=False)
class HotCold(RowSharded):
    """Arrays and states are {"hot": of the hot rows, "cold": of all rows, spread}; what "cold" holds for hot
    rows is not read."""

    hot_ids: jax.Array | None = None  # int32[H], ascending, without padding

    def __post_init__(self):
        super().__post_init__()
        ids = np.asarray([] if self.hot_ids is None else self.hot_ids)
        if not (ids.size and ids[0] > 0 and ids[-1] < self.num_rows and (np.diff(ids) > 0).all()):
            raise ValueError(f"hot_ids={ids} must be ascending ids from 1 to {self.num_rows - 1} (HotCold)")

    @property
    def spec(self) -> dict:
        return {"hot": P(), "cold": P(AXES)}

    def state_specs(self, state) -> dict:
        return {name: _specs_like(state[name], spec) for name, spec in self.spec.items()}

    def init_state(self, optimizer):
        return lambda arrays: {name: optimizer.init(array) for name, array in arrays.items()}

    def arrange(self, table_VD) -> dict:
        return {"hot": table_VD[self.hot_ids], "cold": self.placement.place(table_VD)}

    def spread(self, arrays) -> jax.Array:
        return arrays["cold"].at[self.placement.to_physical(self.hot_ids)].set(arrays["hot"])

    def catch_up(self, optimizer, arrays, state) -> tuple:
        parts = {name: super(HotCold, self).catch_up(optimizer, arrays[name], state[name]) for name in arrays}
        return {name: part[0] for name, part in parts.items()}, {
            name: part[1] for name, part in parts.items()
        }

    def read(self, optimizer, arrays, state, ids_N, touched: None = None) -> Read:
        """Its rows are not deduped on the host."""
        num_hot = len(self.hot_ids)
        index_N = jnp.clip(jnp.searchsorted(self.hot_ids, ids_N), 0, num_hot - 1).astype(jnp.int32)
        is_hot_N = self.hot_ids[index_N] == ids_N
        cold = super().read(optimizer, arrays["cold"], state["cold"], jnp.where(is_hot_N, 0, ids_N))
        hot_HD = read_rows(optimizer, arrays["hot"], state["hot"], jnp.arange(num_hot))
        is_touched_H = (
            jnp.zeros(num_hot, bool).at[jnp.where(is_hot_N, index_N, num_hot)].set(True, mode="drop")
        )
        place_N = jnp.where(is_hot_N, cold.rows_UD.shape[0] + index_N, cold.place_N)
        rows_UD = jnp.concatenate([cold.rows_UD, hot_HD])
        return Read(rows_UD, place_N, (cold.touched, is_touched_H), cold.rounds)

    def sum_grads(self, touched, grads_UD) -> tuple:
        rows_U, is_touched_H = touched
        cold_UD, hot_HD = jnp.split(grads_UD, [rows_U.size])
        is_touched_H = jax.lax.psum(is_touched_H.astype(jnp.int32), "data") > 0
        return (rows_U, is_touched_H), (cold_UD, jax.lax.psum(hot_HD, "data"))

    def sum_squares(self, touched, grads) -> jax.Array:
        return super().sum_squares(touched[0], grads[0]) + jnp.sum(grads[1] ** 2)

    def update(self, optimizer, arrays, state, touched, grads) -> tuple:
        rows_U, is_touched_H = touched
        cold, cold_state, squares = super().update(optimizer, arrays["cold"], state["cold"], rows_U, grads[0])
        hot, hot_state = _update_some(optimizer, arrays["hot"], state["hot"], is_touched_H, grads[1])
        arrays, state = {"hot": hot, "cold": cold}, {"hot": hot_state, "cold": cold_state}
        return arrays, state, squares + jnp.sum(grads[1] ** 2)


def _update_some(optimizer, table_HD, state, is_touched_H, grads_HD) -> tuple:
    """One step on the touched rows of a small table, computed for all of them."""
    updates_HD, new = optimizer.update(grads_HD, state, table_HD)
    is_touched_H1 = is_touched_H[:, None]

    def pick(new, old):
        if not is_rows(old, len(table_HD)):
            return new
        return jnp.where(is_touched_H1 if old.ndim == 2 else is_touched_H, new, old)

    return table_HD + jnp.where(is_touched_H1, updates_HD, 0), jax.tree.map(pick, new, state)


def _specs_like(state, spec: P):
    return jax.tree.map(lambda x: P(*tuple(spec)[: x.ndim]), state)


def shardings(mesh: Mesh, specs):
    """The same tree of NamedShardings."""
    return jax.tree.map(partial(NamedSharding, mesh), specs)
