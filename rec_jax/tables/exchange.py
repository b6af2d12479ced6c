"""Reads and updates of tables whose rows are sharded over a mesh with the axes "data" and "model".

The batch is split over "data" and whole on every device of "model". A device exchanges ids, rows and
gradients by all_to_all with the other devices of its place in "model", and a sum over "model" completes what
is read. All functions but those of `Placement` run inside a shard_map over both axes.

An exchange has a fixed capacity for each pair of devices. Ids beyond it are not dropped: they go in
further rounds. A round takes, for each owner, the rows below a bound that all devices agree on, so that all
gradients of a row meet in one round and an optimizer sees their sum.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rec_jax.tables.sparse import (
    DistinctIds,
    add_rows,
    dedupe,
    find_rows,
    read_rows,
    update_rows,
    with_counts_of,
)

AXES = ("model", "data")  # of a table's rows, in this order
NUM_GROUPS = 1024  # a mesh must divide it


@dataclass(frozen=True)
class Placement:
    """Where a row is placed: row r of the catalogue is row `to_physical(r)` of the array.

    Neighbours go to different groups, and whole groups to a device, so that popular items, whose ids are
    often near each other, are on different devices. It does not depend on the mesh.
    """

    num_rows: int

    @property
    def size(self) -> int:
        """Rows of the array: as many as in the catalogue, rounded up to whole groups."""
        return -(-self.num_rows // NUM_GROUPS) * NUM_GROUPS

    def to_physical(self, ids):
        """An id outside [0, num_rows) becomes -1."""
        rows = ids % NUM_GROUPS * (self.size // NUM_GROUPS) + ids // NUM_GROUPS
        return jnp.where((ids >= 0) & (ids < self.num_rows), rows, -1)

    def is_real(self, rows):
        """Whether rows of the array hold an item: neither padding (id 0) nor what fills up the groups."""
        ids = self.to_ids(rows)
        return (ids > 0) & (ids < self.num_rows)

    def to_ids(self, rows):
        """The id of each row of the array; those that fill up the groups get ids beyond the catalogue."""
        return rows % (self.size // NUM_GROUPS) * NUM_GROUPS + rows // (self.size // NUM_GROUPS)

    def place(self, table_VX):
        """The array from a table in the order of ids, filled up with zeros."""
        pad = [(0, self.size - self.num_rows)] + [(0, 0)] * (table_VX.ndim - 1)
        groups = jnp.pad(table_VX, pad).reshape(-1, NUM_GROUPS, *table_VX.shape[1:])
        return groups.swapaxes(0, 1).reshape(self.size, *table_VX.shape[1:])

    def unplace(self, array, axis: int = 0):
        """The table in the order of ids, or anything else with an axis of rows."""
        before, after = array.shape[:axis], array.shape[axis + 1 :]
        groups = array.reshape(*before, NUM_GROUPS, -1, *after).swapaxes(axis, axis + 1)
        return jax.lax.slice_in_dim(groups.reshape(array.shape), 0, self.num_rows, axis=axis)


def shard_index():
    """Which part of the rows this device has."""
    return jax.lax.axis_index("model") * jax.lax.axis_size("data") + jax.lax.axis_index("data")


def dedupe_physical(placement: Placement, ids_N) -> DistinctIds:
    return dedupe(placement.to_physical(ids_N), placement.size)


def _exchange(rows_U, local_rows: int, capacity: int, carry, one_round):
    """carry after `one_round(carry, place_EC, asked_EC)` for as many rounds as it takes, and their number.

    rows_U: from `dedupe_physical`. place_EC: places in rows_U that go to each of E devices of this column
    in this round, or U where there is none. asked_EC: rows of this device that the others ask for,
    local_rows where there is none.
    """
    num_owners = jax.lax.axis_size("data")
    first = jax.lax.axis_index("model") * num_owners
    edges = (first + jnp.arange(num_owners + 1)) * local_rows
    bounds = jnp.searchsorted(rows_U, edges).astype(jnp.int32)
    ends_E, size = bounds[1:], rows_U.size

    def is_left(state):
        return state[1]

    def round_(state):
        carry, _, at_E, count = state
        # The first row for an owner that does not fit here; the least of all devices' bounds the round.
        beyond_E = rows_U.at[at_E + capacity].get(mode="clip")
        beyond_E = jnp.where(at_E + capacity < ends_E, beyond_E, edges[1:])
        stop_E = jnp.searchsorted(rows_U, jax.lax.pmin(beyond_E, "data")).astype(jnp.int32)
        place_EC = at_E[:, None] + jnp.arange(capacity)
        place_EC = jnp.where(place_EC < stop_E[:, None], place_EC, size)
        wanted_EC = rows_U.at[place_EC].get(mode="clip") - edges[:-1, None]
        wanted_EC = jnp.where(place_EC < size, wanted_EC, local_rows)
        carry = one_round(carry, place_EC, _swap(wanted_EC))
        left = jax.lax.pmax(jnp.any(stop_E < ends_E), AXES)
        return carry, left, stop_E, count + 1

    state = (carry, jnp.array(True), bounds[:-1], jnp.zeros((), jnp.int32))
    carry, _, _, count = jax.lax.while_loop(is_left, round_, state)
    return carry, count


def _swap(x_EC):
    """What the other devices of the column have for this one."""
    return jax.lax.all_to_all(x_EC, "data", split_axis=0, concat_axis=0, tiled=True)


def read_sharded(optimizer, table_vD, state, rows_U, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(rows f32[U, D] of the whole table at the physical rows_U, number of rounds).

    The place of ids that are no rows is NaN. optimizer, state: of the local rows, for what they have missed.
    """
    local_rows, dim = table_vD.shape
    columns = jax.lax.axis_size("model")

    def one_round(rows_UD, place_EC, asked_EC):
        found_ND = read_rows(optimizer, table_vD, state, asked_EC.reshape(-1))
        found_ECD = _swap(found_ND.reshape(*asked_EC.shape, dim))
        return rows_UD.at[place_EC].set(found_ECD, mode="drop")

    zeros_UD = jnp.zeros((rows_U.size, dim), table_vD.dtype)
    rows_UD, rounds = _exchange(rows_U, local_rows, capacity, zeros_UD, one_round)
    if columns > 1:
        rows_UD = jax.lax.psum(rows_UD, "model")
    num_rows = local_rows * columns * jax.lax.axis_size("data")
    is_bad_U1 = (rows_U == num_rows)[:, None]
    return jnp.where(is_bad_U1, jnp.nan, rows_UD), rounds


def _sum_by_owner(rows_U, grads_UD, local_rows: int, capacity: int, carry, use):
    """carry after `use(carry, rows_M, sums_MD)` of each round: distinct local rows, and the sums
    of their gradients over all devices."""
    dim = grads_UD.shape[1]

    def one_round(carry, place_EC, asked_EC):
        grads_ECD = _swap(grads_UD.at[place_EC].get(mode="fill", fill_value=0))
        distinct = find_rows(asked_EC.reshape(-1), local_rows)
        zeros_MD = jnp.zeros((asked_EC.size, dim), grads_UD.dtype)
        return use(carry, distinct.rows_U, zeros_MD.at[distinct.local_ids_N].add(grads_ECD.reshape(-1, dim)))

    return _exchange(rows_U, local_rows, capacity, carry, one_round)[0]


def update_sharded(optimizer, table_vD, state, rows_U, grads_UD, capacity: int) -> tuple:
    """(table_vD, state, sum of all squared gradients) after one step on the rows that any device has read.

    grads_UD: of this device's rows_U, the same on every device of "model". state: of the local rows.
    """
    local_rows, before = len(table_vD), state

    def use(carry, rows_M, sums_MD):
        table_vD, state, squares = carry
        state = with_counts_of(before, state, local_rows)
        table_vD, state = update_rows(optimizer, table_vD, state, rows_M, sums_MD)
        return table_vD, state, squares + jnp.sum(sums_MD**2)

    carry = (table_vD, state, jnp.zeros((), jnp.float32))
    table_vD, state, squares = _sum_by_owner(rows_U, grads_UD, local_rows, capacity, carry, use)
    return table_vD, state, jax.lax.psum(squares, AXES)


def sum_squares_sharded(rows_U, grads_UD, local_rows: int, capacity: int) -> jax.Array:
    """The sum of all squared gradients alone, at the price of an exchange of its own."""

    def use(squares, rows_M, sums_MD):
        return squares + jnp.sum(sums_MD**2)

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.psum(_sum_by_owner(rows_U, grads_UD, local_rows, capacity, zero, use), AXES)


def scatter_sharded(rows_U, grads_UD, local_rows: int, capacity: int) -> jax.Array:
    """f32[local_rows, D]: the gradient of all local rows, for an optimizer that sweeps the table."""

    zeros_vD = jnp.zeros((local_rows, grads_UD.shape[1]), jnp.float32)
    return _sum_by_owner(rows_U, grads_UD, local_rows, capacity, zeros_vD, add_rows)
