"""Reads and updates of row-sharded tables, over a mesh with the axes "data" and "model".

The batch is split over "data" and replicated over "model". A device exchanges ids, entries and gradients by
all-to-all with the devices that share its index in "model", its column; a sum over "model" completes a read.
All functions except the methods of `Placement` run inside a shard_map over both axes.

This module identifies an entry by its row in the sharded array (see `Placement`), not by its id.

An exchange has a fixed capacity for each pair of devices. Ids that exceed it are not dropped: they are sent
in further rounds. A round takes, for each owner, the rows below a bound that is the same on all devices. All
gradients of an entry are therefore exchanged in the same round, and the optimizer gets their sum.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rec_jax.tables.sparse import (
    DistinctIds,
    add_entries,
    dedupe,
    find_distinct,
    keep_counts,
    read_entries,
    update_entries,
)

AXES = ("model", "data")  # the mesh axes over which rows are sharded, in this order
NUM_GROUPS = 1024  # the number of devices must divide it


@dataclass(frozen=True)
class Placement:
    """The placement of entries in a row-sharded array: the entry with id i is row `to_physical(i)`.

    Consecutive ids are in different groups of rows, and a device holds whole groups. Popular items often have
    consecutive ids, so this distributes them over the devices. The placement does not depend on the mesh.
    """

    num_rows: int

    @property
    def size(self) -> int:
        """The number of rows of the array: num_rows rounded up to whole groups."""
        return -(-self.num_rows // NUM_GROUPS) * NUM_GROUPS

    def to_physical(self, ids):
        """Returns the row of each id, or -1 for an id outside [0, num_rows)."""
        row_ids = ids % NUM_GROUPS * (self.size // NUM_GROUPS) + ids // NUM_GROUPS
        return jnp.where((ids >= 0) & (ids < self.num_rows), row_ids, -1)

    def is_real(self, row_ids):
        """Whether rows of the array hold an item: neither padding (id 0) nor a filler row of a group."""
        ids = self.to_ids(row_ids)
        return (ids > 0) & (ids < self.num_rows)

    def to_ids(self, row_ids):
        """Returns the id of each row of the array. Filler rows have ids of at least num_rows."""
        return row_ids % (self.size // NUM_GROUPS) * NUM_GROUPS + row_ids // (self.size // NUM_GROUPS)

    def place(self, table_VX):
        """Returns the array for a table in the order of ids; filler rows are zeros."""
        pad = [(0, self.size - self.num_rows)] + [(0, 0)] * (table_VX.ndim - 1)
        groups = jnp.pad(table_VX, pad).reshape(-1, NUM_GROUPS, *table_VX.shape[1:])
        return groups.swapaxes(0, 1).reshape(self.size, *table_VX.shape[1:])

    def unplace(self, array, axis: int = 0):
        """Returns the array with `axis`, the one that runs over rows, in the order of ids."""
        before, after = array.shape[:axis], array.shape[axis + 1 :]
        groups = array.reshape(*before, NUM_GROUPS, -1, *after).swapaxes(axis, axis + 1)
        return jax.lax.slice_in_dim(groups.reshape(array.shape), 0, self.num_rows, axis=axis)


def shard_index():
    """Returns the index of this device's shard of rows."""
    return jax.lax.axis_index("model") * jax.lax.axis_size("data") + jax.lax.axis_index("data")


def dedupe_physical(placement: Placement, ids_N) -> DistinctIds:
    return dedupe(placement.to_physical(ids_N), placement.size)


def _exchange(row_ids_U, num_local: int, capacity: int, carry, one_round):
    """Returns (carry, number of rounds); carry is updated by `one_round(carry, slots_EC, local_rows_EC)`.

    row_ids_U: from `dedupe_physical`. slots_EC: the indices in row_ids_U of the rows that this device
    requests from each of the E devices of its column in this round; U = none. local_rows_EC: the rows of this
    device that each of them requests from it; num_local = none.
    """
    num_owners = jax.lax.axis_size("data")
    first = jax.lax.axis_index("model") * num_owners
    edges = (first + jnp.arange(num_owners + 1)) * num_local
    bounds = jnp.searchsorted(row_ids_U, edges).astype(jnp.int32)
    ends_E, size = bounds[1:], row_ids_U.size

    def has_more(state):
        return state[1]

    def round_(state):
        carry, _, start_E, count = state
        # For each owner, the first row that does not fit; the round is bounded by the least over all devices.
        beyond_E = row_ids_U.at[start_E + capacity].get(mode="clip")
        beyond_E = jnp.where(start_E + capacity < ends_E, beyond_E, edges[1:])
        stop_E = jnp.searchsorted(row_ids_U, jax.lax.pmin(beyond_E, "data")).astype(jnp.int32)
        slots_EC = start_E[:, None] + jnp.arange(capacity)
        slots_EC = jnp.where(slots_EC < stop_E[:, None], slots_EC, size)
        request_EC = row_ids_U.at[slots_EC].get(mode="clip") - edges[:-1, None]
        request_EC = jnp.where(slots_EC < size, request_EC, num_local)
        carry = one_round(carry, slots_EC, _swap(request_EC))
        any_left = jax.lax.pmax(jnp.any(stop_E < ends_E), AXES)
        return carry, any_left, stop_E, count + 1

    state = (carry, jnp.array(True), bounds[:-1], jnp.zeros((), jnp.int32))
    carry, _, _, count = jax.lax.while_loop(has_more, round_, state)
    return carry, count


def _swap(x_EC):
    """All-to-all in the column: returns what each device has for this one."""
    return jax.lax.all_to_all(x_EC, "data", split_axis=0, concat_axis=0, tiled=True)


def read_sharded(optimizer, table_vD, state, row_ids_U, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Returns (entries f32[U, D] at rows row_ids_U of the whole table, number of rounds).

    Invalid ids read as NaN. optimizer, state: of this device's rows, needed for their missed steps.
    """
    num_local, dim = table_vD.shape
    num_columns = jax.lax.axis_size("model")

    def one_round(entries_UD, slots_EC, local_rows_EC):
        entries_ND = read_entries(optimizer, table_vD, state, local_rows_EC.reshape(-1))
        entries_ECD = _swap(entries_ND.reshape(*local_rows_EC.shape, dim))
        return entries_UD.at[slots_EC].set(entries_ECD, mode="drop")

    zeros_UD = jnp.zeros((row_ids_U.size, dim), table_vD.dtype)
    entries_UD, rounds = _exchange(row_ids_U, num_local, capacity, zeros_UD, one_round)
    if num_columns > 1:
        entries_UD = jax.lax.psum(entries_UD, "model")
    num_rows = num_local * num_columns * jax.lax.axis_size("data")
    is_invalid_U1 = (row_ids_U == num_rows)[:, None]
    return jnp.where(is_invalid_U1, jnp.nan, entries_UD), rounds


def _sum_by_owner(row_ids_U, grads_UD, num_local: int, capacity: int, carry, use):
    """Returns carry after calling `use(carry, local_rows_M, sums_MD)` in each round: distinct rows of this
    device, and the sums of their gradients over all devices."""
    dim = grads_UD.shape[1]

    def one_round(carry, slots_EC, local_rows_EC):
        grads_ECD = _swap(grads_UD.at[slots_EC].get(mode="fill", fill_value=0))
        distinct = find_distinct(local_rows_EC.reshape(-1), num_local)
        zeros_MD = jnp.zeros((local_rows_EC.size, dim), grads_UD.dtype)
        return use(
            carry, distinct.entry_ids_U, zeros_MD.at[distinct.local_ids_N].add(grads_ECD.reshape(-1, dim))
        )

    return _exchange(row_ids_U, num_local, capacity, carry, one_round)[0]


def update_sharded(optimizer, table_vD, state, row_ids_U, grads_UD, capacity: int) -> tuple:
    """Returns (table_vD, state, sum of all squared gradients) after one step on all entries read.

    grads_UD: gradients of row_ids_U, the same on every device of "model". state: of this device's rows.
    """
    num_local, before = len(table_vD), state

    def use(carry, local_rows_M, sums_MD):
        table_vD, state, squares = carry
        state = keep_counts(before, state, num_local)
        table_vD, state = update_entries(optimizer, table_vD, state, local_rows_M, sums_MD)
        return table_vD, state, squares + jnp.sum(sums_MD**2)

    carry = (table_vD, state, jnp.zeros((), jnp.float32))
    table_vD, state, squares = _sum_by_owner(row_ids_U, grads_UD, num_local, capacity, carry, use)
    return table_vD, state, jax.lax.psum(squares, AXES)


def sum_squares_sharded(row_ids_U, grads_UD, num_local: int, capacity: int) -> jax.Array:
    """Returns the sum of all squared gradients; it takes a separate exchange."""

    def use(squares, local_rows_M, sums_MD):
        return squares + jnp.sum(sums_MD**2)

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.psum(_sum_by_owner(row_ids_U, grads_UD, num_local, capacity, zero, use), AXES)


def scatter_sharded(row_ids_U, grads_UD, num_local: int, capacity: int) -> jax.Array:
    """f32[num_local, D]: the gradient of this device's rows, for an optimizer that updates all of them."""
    zeros_vD = jnp.zeros((num_local, grads_UD.shape[1]), jnp.float32)
    return _sum_by_owner(row_ids_U, grads_UD, num_local, capacity, zeros_vD, add_entries)
