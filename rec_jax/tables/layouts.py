"""How a table is sharded over a mesh with the axes "data" and "model", and its rows are read and updated.

A batch is split over "data" and whole on every device of "model". Three layouts of one interface:

    Replicated   every device has the whole table
    RowSharded   rows are sharded over all devices; distinct ids, rows and gradients are exchanged
    DimSharded   each device of "model" has some of the dims of all rows

`place`, `unplace` and `init` work on whole arrays, all other methods inside a shard_map over both axes, on
what one device has. An update has two halves, so that a caller can scale the gradients in between:

    read = layout.read(optimizer, arrays, state, ids_N)
    read.rows_UD[read.local_ids_N]                                       the lookup
    entry_ids, grads = layout.sum_grads(read.entry_ids, grads_UD)        of read.rows_UD
    arrays, state, squares = layout.update(optimizer, arrays, state, entry_ids, grads)
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.tables import exchange
from rec_jax.tables.exchange import AXES, NUM_GROUPS, Placement
from rec_jax.tables.sparse import find_rows, read_rows, update_rows


class Read(NamedTuple):
    """What one device has read. Id 0, padding, must be among the ids; its place is 0."""

    rows_UD: jax.Array
    local_ids_N: jax.Array  # int32[N]: rows_UD[local_ids_N] are the rows of the ids
    entry_ids: Any  # which rows these are, for `sum_grads`
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
        return jax.tree.map(lambda x: P(*tuple(self.spec)[: x.ndim]), state)

    def place(self, table_VD):
        """The arrays on the mesh, of a table in the order of ids."""
        if len(table_VD) != self.num_rows:
            raise ValueError(f"a table of {len(table_VD)} rows must have num_rows={self.num_rows}")
        return jax.jit(self.arrange, out_shardings=shardings(self.mesh, self.spec))(table_VD)

    def init(self, optimizer, arrays):
        """The state of the optimizer, its rows placed like those of the table."""
        specs = self.state_specs(jax.eval_shape(optimizer.init, arrays))
        return jax.jit(optimizer.init, out_shardings=shardings(self.mesh, specs))(arrays)

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

    def read(self, optimizer, table_VD, state, ids_N) -> Read:
        distinct = find_rows(ids_N, self.num_rows)
        rows_UD = read_rows(optimizer, table_VD, state, distinct.rows_U)
        return Read(rows_UD, distinct.local_ids_N, distinct.rows_U, jnp.ones((), jnp.int32))

    def sum_grads(self, rows_U, grads_UD) -> tuple:
        """Sums over all devices: distinct rows, and their gradients."""
        if self.mesh.shape["data"] == 1:
            return rows_U, grads_UD
        rows_N = jax.lax.all_gather(rows_U, "data", tiled=True)
        grads_ND = jax.lax.all_gather(grads_UD, "data", tiled=True)
        # The free places of all devices become one and the same id that is no row.
        distinct = find_rows(jnp.minimum(rows_N, self.num_rows), self.num_rows)
        return distinct.rows_U, jnp.zeros_like(grads_ND).at[distinct.local_ids_N].add(grads_ND)

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

    def read(self, optimizer, table_Vd, state, ids_N) -> Read:
        part = super().read(optimizer, table_Vd, state, ids_N)
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
                f"rows are sharded over mesh.data * mesh.model = {self.mesh.size} devices, which must divide "
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

    def unplace(self, arrays) -> jax.Array:
        return self.placement.unplace(arrays)

    @property
    def _local_rows(self) -> int:
        return self.placement.size // self.mesh.size

    def _capacity(self, num_ids: int) -> int:
        return max(1, math.ceil(self.capacity_factor * num_ids / self.mesh.size))

    def read(self, optimizer, table_vD, state, ids_N) -> Read:
        distinct = exchange.dedupe_physical(self.placement, ids_N)
        rows_UD, rounds = exchange.read_sharded(
            optimizer, table_vD, state, distinct.rows_U, self._capacity(ids_N.size)
        )
        return Read(rows_UD, distinct.local_ids_N, distinct.rows_U, rounds)

    def sum_grads(self, rows_U, grads_UD) -> tuple:
        """As they are: it is the owners of rows who sum."""
        return rows_U, grads_UD

    def sum_squares(self, rows_U, grads_UD) -> jax.Array:
        return exchange.sum_squares_sharded(rows_U, grads_UD, self._local_rows, self._capacity(rows_U.size))

    def update(self, optimizer, table_vD, state, rows_U, grads_UD) -> tuple:
        return exchange.update_sharded(
            optimizer, table_vD, state, rows_U, grads_UD, self._capacity(rows_U.size)
        )

    def scatter(self, rows_U, grads_UD) -> jax.Array:
        """f32[local rows, D]: the gradient of all local rows."""
        return exchange.scatter_sharded(rows_U, grads_UD, self._local_rows, self._capacity(rows_U.size))


def shardings(mesh: Mesh, specs):
    """The same tree of NamedShardings."""
    return jax.tree.map(partial(NamedSharding, mesh), specs)
