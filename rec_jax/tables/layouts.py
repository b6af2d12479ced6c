"""Layouts of an embedding table on a mesh with the axes "data" and "model", with their reads and updates.

A batch is split over "data" and replicated over "model". Three layouts have the same interface:

    Replicated   every device has the whole table
    RowSharded   rows are sharded over all devices; distinct ids, entries and gradients are exchanged
    DimSharded   dims are sharded over "model"; each device has some dims of all entries

`place`, `unplace`, `init` and `catch_up` take whole arrays. The other methods run inside a shard_map over
both axes, on the arrays of one device. An update has two parts, between which the caller can scale gradients:

    read = layout.read(optimizer, arrays, state, ids_N)
    read.entries_UD[read.local_ids_N]                               the lookup
    entry_ids, grads = layout.sum_grads(read.entry_ids, grads_UD)   grads_UD: gradients of read.entries_UD
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
from rec_jax.tables.sparse import find_distinct, read_entries, update_entries


class Read(NamedTuple):
    """The entries that one device has read. The first id must be 0, padding; its local id is 0."""

    entries_UD: jax.Array
    local_ids_N: jax.Array  # int32[N]: entries_UD[local_ids_N] are the entries of the ids
    entry_ids: Any  # for `sum_grads`: ids of these entries, or their rows in the array if row-sharded
    rounds: jax.Array  # int32 scalar: rounds of exchange; more than 1 if ids exceeded a capacity


@dataclass(frozen=True)
class Replicated:
    num_rows: int  # padding included
    mesh: Mesh

    @property
    def spec(self) -> P:
        return P()

    def state_specs(self, state):
        """Returns the PartitionSpecs of the optimizer state, which match `spec`."""
        return jax.tree.map(lambda x: P(*tuple(self.spec)[: x.ndim]), state)

    def place(self, table_VD):
        """Returns the arrays on the mesh. table_VD: in the order of ids."""
        if len(table_VD) != self.num_rows:
            raise ValueError(f"the table has {len(table_VD)} rows: it must have num_rows={self.num_rows}")
        return jax.jit(self.arrange, out_shardings=shardings(self.mesh, self.spec))(table_VD)

    def init(self, optimizer, arrays):
        """Returns the optimizer state, sharded like the table."""
        specs = self.state_specs(jax.eval_shape(optimizer.init, arrays))
        return jax.jit(optimizer.init, out_shardings=shardings(self.mesh, specs))(arrays)

    def arrange(self, table_VD):
        """Returns the whole array that `place` puts on the mesh."""
        return table_VD

    def unplace(self, arrays) -> jax.Array:
        """Returns the table in the order of ids."""
        return arrays

    def catch_up(self, optimizer, arrays, state) -> tuple:
        """Returns (arrays, state) with all missed steps added; call it before the whole table is read."""
        updates, state = optimizer.missed(state)
        return arrays + updates, state

    def read(self, optimizer, table_VD, state, ids_N) -> Read:
        distinct = find_distinct(ids_N, self.num_rows)
        entries_UD = read_entries(optimizer, table_VD, state, distinct.entry_ids_U)
        return Read(entries_UD, distinct.local_ids_N, distinct.entry_ids_U, jnp.ones((), jnp.int32))

    def sum_grads(self, entry_ids_U, grads_UD) -> tuple:
        """Returns (distinct entry ids, gradients), summed over all devices."""
        if self.mesh.shape["data"] == 1:
            return entry_ids_U, grads_UD
        entry_ids_N = jax.lax.all_gather(entry_ids_U, "data", tiled=True)
        grads_ND = jax.lax.all_gather(grads_UD, "data", tiled=True)
        # The unused slots of all devices become one invalid id, num_rows.
        distinct = find_distinct(jnp.minimum(entry_ids_N, self.num_rows), self.num_rows)
        return distinct.entry_ids_U, jnp.zeros_like(grads_ND).at[distinct.local_ids_N].add(grads_ND)

    def sum_squares(self, entry_ids_U, grads_UD) -> jax.Array:
        return jnp.sum(grads_UD**2)

    def update(self, optimizer, table_VD, state, entry_ids_U, grads_UD) -> tuple:
        """Returns (arrays, state, sum of squared gradients) after one optimizer step."""
        updated = update_entries(optimizer, table_VD, state, entry_ids_U, grads_UD)
        return *updated, self.sum_squares(entry_ids_U, grads_UD)


@dataclass(frozen=True)
class DimSharded(Replicated):
    """Dims sharded over "model", over which an optimizer that sums over dims must sum too."""

    @property
    def spec(self) -> P:
        return P(None, "model")

    def arrange(self, table_VD):
        parts = self.mesh.shape["model"]
        if table_VD.shape[1] % parts:
            raise ValueError(
                f"layout='dims' cannot shard {table_VD.shape[1]} dims over mesh.model={parts}: choose a "
                "divisor of the dims, or another table.layout"
            )
        return table_VD

    def read(self, optimizer, table_Vd, state, ids_N) -> Read:
        part = super().read(optimizer, table_Vd, state, ids_N)
        return part._replace(entries_UD=jax.lax.all_gather(part.entries_UD, "model", axis=1, tiled=True))

    def sum_grads(self, entry_ids_U, grads_UD) -> tuple:
        dim = grads_UD.shape[1] // jax.lax.axis_size("model")
        grads_Ud = jax.lax.dynamic_slice_in_dim(grads_UD, jax.lax.axis_index("model") * dim, dim, axis=1)
        return super().sum_grads(entry_ids_U, grads_Ud)

    def sum_squares(self, entry_ids_U, grads_Ud) -> jax.Array:
        return jax.lax.psum(jnp.sum(grads_Ud**2), "model")


@dataclass(frozen=True)
class RowSharded(Replicated):
    capacity_factor: float = 1.0  # entries sent to a device per round, as a multiple of an even share

    def __post_init__(self):
        if NUM_GROUPS % self.mesh.size:
            raise ValueError(
                f"layout='rows' cannot shard over mesh.data * mesh.model = {self.mesh.size} devices, which "
                f"must divide {NUM_GROUPS}: use a power of two, or another table.layout"
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
    def _num_local(self) -> int:
        return self.placement.size // self.mesh.size

    def _capacity(self, num_ids: int) -> int:
        return max(1, math.ceil(self.capacity_factor * num_ids / self.mesh.size))

    def read(self, optimizer, table_vD, state, ids_N) -> Read:
        distinct = exchange.dedupe_physical(self.placement, ids_N)
        entries_UD, rounds = exchange.read_sharded(
            optimizer, table_vD, state, distinct.entry_ids_U, self._capacity(ids_N.size)
        )
        return Read(entries_UD, distinct.local_ids_N, distinct.entry_ids_U, rounds)

    def sum_grads(self, entry_ids_U, grads_UD) -> tuple:
        """Returns its arguments: `update` sums on the device that owns an entry."""
        return entry_ids_U, grads_UD

    def sum_squares(self, entry_ids_U, grads_UD) -> jax.Array:
        return exchange.sum_squares_sharded(
            entry_ids_U, grads_UD, self._num_local, self._capacity(entry_ids_U.size)
        )

    def update(self, optimizer, table_vD, state, entry_ids_U, grads_UD) -> tuple:
        return exchange.update_sharded(
            optimizer, table_vD, state, entry_ids_U, grads_UD, self._capacity(entry_ids_U.size)
        )

    def scatter(self, entry_ids_U, grads_UD) -> jax.Array:
        """f32[rows of this device, D]: their gradient, zero for entries not read."""
        return exchange.scatter_sharded(
            entry_ids_U, grads_UD, self._num_local, self._capacity(entry_ids_U.size)
        )


def shardings(mesh: Mesh, specs):
    """Returns the tree of specs as NamedShardings."""
    return jax.tree.map(partial(NamedSharding, mesh), specs)
