"""Named embedding tables in a training step: none, one or several, each with its layout and optimizer.

    dense, arrays = tables.split(params)            # arrays: {name: table}; all other parameters stay
    reads = tables.read(arrays, states, ids)        # ids: {name: a pytree of int32 arrays, 0 = padding}
    params = tables.join(dense, reads.rows)         # what a loss is differentiated with respect to
    ... rows[reads.local_ids[...]] is a lookup ...
    reads, grads = tables.sum_grads(reads, grads)   # over devices
    arrays, states, squares = tables.update(arrays, states, reads, grads)

A table that is a parameter like any other is not among them; with no tables every method returns what it was
given. To clip, or to divide by a number of tokens, scale what `sum_grads` returns.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from rec_jax.tables.exchange import AXES, Placement
from rec_jax.tables.layouts import Replicated
from rec_jax.tables.sparse import RowOptimizer
from rec_jax.tree import pop_leaf, with_leaf


@dataclass(frozen=True)
class Table:
    """path: of its parameter, "items/embedding". is_dense: updated as a whole in every step, for a loss that
    reads all of it; then its layout is RowSharded. Else only the entries that a batch reads are updated."""

    path: str
    layout: Replicated
    optimizer: optax.GradientTransformation | RowOptimizer
    is_dense: bool = False

    @property
    def placement(self) -> Placement | None:
        """Where its rows are, if they are sharded."""
        return getattr(self.layout, "placement", None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reads:
    """What a device has read of each table, by name.

    rows: f32[U, D], the distinct entries. places: the pytrees of ids, as places in the rows. entry_ids: which
    entries these are. rounds: int32, see `layouts.Read`.
    """

    rows: dict[str, jax.Array]
    local_ids: dict[str, Any]
    entry_ids: dict[str, Any]
    rounds: dict[str, jax.Array]


@dataclass(frozen=True)
class Tables:
    """Every dict that these methods take and return has all of the names.

    The methods from `read` on work inside a shard_map over both axes, on what one device has, the others on
    whole arrays.
    """

    tables: dict[str, Table]

    def __bool__(self) -> bool:
        return bool(self.tables)

    def __getitem__(self, name: str) -> Table:
        return self.tables[name]

    @property
    def placement(self):
        """Of the rows of a table that a loss reads as a whole, None where there is none."""
        return next((table.placement for table in self.tables.values() if table.is_dense), None)

    def split(self, params: dict) -> tuple[dict, dict]:
        """(the parameters without the tables, {name: table})."""
        arrays = {}
        for name, table in self.tables.items():
            params, arrays[name] = pop_leaf(params, table.path)
        return params, arrays

    def join(self, dense: dict, arrays: dict) -> dict:
        """The parameters with those arrays in the places of the tables."""
        for name, table in self.tables.items():
            dense = with_leaf(dense, table.path, arrays[name])
        return dense

    def place(self, whole: dict) -> dict:
        """The arrays on the mesh. whole: tables [V, D] in the order of ids."""
        return self._each(lambda table, x: table.layout.place(x), whole)

    def unplace(self, params: dict) -> dict:
        """The parameters with tables in the order of ids."""
        dense, arrays = self.split(params)
        return self.join(dense, self._each(lambda table, x: table.layout.unplace(x), arrays))

    def init(self, arrays: dict) -> dict:
        """The states of the optimizers."""
        return self._each(lambda table, x: table.layout.init(table.optimizer, x), arrays)

    @property
    def specs(self) -> dict:
        """How the arrays are placed on the mesh, for a shard_map."""
        return self._each(lambda table: table.layout.spec)

    def state_specs(self, states: dict) -> dict:
        return self._each(lambda table, x: table.layout.state_specs(x), states)

    @property
    def can_catch_up(self) -> bool:
        """Do entries miss steps that must be made up for before a table is read as a whole?"""
        return any(isinstance(table.optimizer, RowOptimizer) for table in self.tables.values())

    def catch_up(self, arrays: dict, states: dict) -> tuple[dict, dict]:
        """(arrays, states) with every entry as an evaluation should see it."""

        def caught_up(table, array, state):
            if not isinstance(table.optimizer, RowOptimizer):
                return array, state
            return table.layout.catch_up(table.optimizer, array, state)

        return _unzip(self._each(caught_up, arrays, states), 2)

    def read(self, arrays: dict, states: dict, ids: dict) -> Reads:
        """All lookups of a step, each distinct entry of a table read once.

        ids: of each table, a pytree of int32 arrays, 0 = padding. One outside the table reads as NaN.
        Raises: ValueError for names that no table has or that are missing, and for ids of other types.
        """
        if ids.keys() != self.tables.keys():
            raise ValueError(f"ids of {sorted(ids)} must be of all tables: {sorted(self.tables)} (Tables)")
        reads, local_ids = {}, {}
        for name, table in self.tables.items():
            types = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(ids[name])})
            if types != ["int32"]:
                raise ValueError(f"ids[{name!r}] must be int32 arrays, at least one, not {types} (Tables)")
            flat_N, unravel = ravel_pytree(ids[name])
            ids_N = jnp.concatenate([jnp.zeros(1, jnp.int32), flat_N])  # layouts want padding among the ids
            optimizer = None if table.is_dense else table.optimizer
            reads[name] = table.layout.read(optimizer, arrays[name], states[name], ids_N)
            local_ids[name] = unravel(reads[name].local_ids_N[1:])
        rows, entry_ids, rounds = (
            {name: getattr(read, field) for name, read in reads.items()}
            for field in ("rows_UD", "entry_ids", "rounds")
        )
        return Reads(rows, local_ids, entry_ids, rounds)

    def shards(self, arrays: dict) -> dict:
        """This device's part of the tables that a loss reads as a whole."""
        return {name: arrays[name] for name, table in self.tables.items() if table.is_dense}

    def sum_grads(self, reads: Reads, grads: dict, shard_grads: dict) -> tuple[Reads, dict]:
        """(reads, grads) for `update`: summed over devices, unless it is the owners of rows who sum.

        grads: of `reads.rows`. shard_grads: of `shards`, complete on their device.
        """

        summed = self._each(lambda table, *read: table.layout.sum_grads(*read), reads.entry_ids, grads)
        entry_ids, grads = _unzip(summed, 2)
        for name, grads_vD in shard_grads.items():
            grads[name] = self[name].layout.scatter(entry_ids[name], grads[name]) + grads_vD
        return dataclasses.replace(reads, entry_ids=entry_ids), grads

    def sum_squares(self, reads: Reads, grads: dict) -> jax.Array | float:
        """f32 scalar: the sum of all squared gradients, at the price of an exchange where rows are sharded.

        reads, grads: from `sum_grads`.
        """

        def squares(table, entry_ids, grads):
            if table.is_dense:
                return jax.lax.psum(jnp.sum(grads**2), AXES)
            return table.layout.sum_squares(entry_ids, grads)

        return sum(self._each(squares, reads.entry_ids, grads).values())

    def update(self, arrays: dict, states: dict, reads: Reads, grads: dict) -> tuple[dict, dict, jax.Array]:
        """(arrays, states, sum of all squared gradients) after one step; entry 0 is always among those read.

        reads, grads: from `sum_grads`.
        """

        def updated(table, array, state, entry_ids, grads):
            if not table.is_dense:
                return table.layout.update(table.optimizer, array, state, entry_ids, grads)
            updates, state = table.optimizer.update(grads, state, array)
            squares = jax.lax.psum(jnp.sum(grads**2), AXES)
            return optax.apply_updates(array, updates), state, squares

        new = self._each(updated, arrays, states, reads.entry_ids, grads)
        arrays, states, squares = _unzip(new, 3)
        return arrays, states, sum(squares.values())

    def _each(self, function, *dicts: dict) -> dict:
        """{name: function(table, what each dict has under the name)}."""
        for given in dicts:
            if given.keys() != self.tables.keys():
                raise ValueError(f"{sorted(given)} must be all tables: {sorted(self.tables)} (Tables)")
        return {name: function(table, *(d[name] for d in dicts)) for name, table in self.tables.items()}


def _unzip(by_name: dict, num: int) -> tuple[dict, ...]:
    return tuple({name: values[i] for name, values in by_name.items()} for i in range(num))
