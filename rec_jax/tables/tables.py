"""Named embedding tables in a training step: none, one or several, each with its layout and optimizer.

    dense, arrays = tables.split(params)                # arrays: {name: table}; dense: the other parameters
    reads = tables.read(arrays, states, ids)            # ids: {name: a pytree of int32 arrays, 0 = padding}
    params = tables.join(dense, reads.entries)          # a loss is differentiated with respect to these
    ... entries[reads.local_ids[...]] is a lookup ...
    reads, grads = tables.sum_grads(reads, grads, {})   # over devices
    arrays, states, squares = tables.update(arrays, states, reads, grads)

Tables that are plain parameters are not among them. Without tables, the methods do nothing. To clip
gradients, or to divide them by a number of tokens, scale the result of `sum_grads`.
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
from rec_jax.tables.sparse import CatchUpOptimizer
from rec_jax.tree import pop_leaf, with_leaf


@dataclass(frozen=True)
class Table:
    """An embedding table with its layout and optimizer.

    path: of its parameter, such as "items/embedding". is_dense: whether every step updates all entries, for a
    loss that reads the whole table; its layout is then RowSharded. Otherwise a step updates the entries that
    it reads.
    """

    path: str
    layout: Replicated
    optimizer: optax.GradientTransformation | CatchUpOptimizer
    is_dense: bool = False

    @property
    def placement(self) -> Placement | None:
        """The placement of its entries if it is row-sharded, otherwise None."""
        return getattr(self.layout, "placement", None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reads:
    """The entries that a device has read, by name of the table.

    entries: f32[U, D], distinct. local_ids: the pytrees of ids, as indices into these entries.
    entry_ids: ids of these entries. rounds: int32, see `layouts.Read`.
    """

    entries: dict[str, jax.Array]
    local_ids: dict[str, Any]
    entry_ids: dict[str, Any]
    rounds: dict[str, jax.Array]


@dataclass(frozen=True)
class Tables:
    """Embedding tables by name. The keys of all dicts are the names of all tables, except in `shards`.

    `read` and the methods after it run inside a shard_map over both axes, on the arrays of one device. The
    methods before it take whole arrays.
    """

    tables: dict[str, Table]

    def __bool__(self) -> bool:
        return bool(self.tables)

    def __getitem__(self, name: str) -> Table:
        return self.tables[name]

    @property
    def placement(self):
        """The placement of the table that a loss reads as a whole, or None if there is none."""
        return next((table.placement for table in self.tables.values() if table.is_dense), None)

    def split(self, params: dict) -> tuple[dict, dict]:
        """Returns (the parameters without the tables, {name: table})."""
        arrays = {}
        for name, table in self.tables.items():
            params, arrays[name] = pop_leaf(params, table.path)
        return params, arrays

    def join(self, dense: dict, arrays: dict) -> dict:
        """Returns the parameters with these arrays as the tables."""
        for name, table in self.tables.items():
            dense = with_leaf(dense, table.path, arrays[name])
        return dense

    def place(self, whole: dict) -> dict:
        """Returns the arrays on the mesh. whole: tables [V, D] in the order of ids."""
        return self._each(lambda table, x: table.layout.place(x), whole)

    def unplace(self, params: dict) -> dict:
        """Returns the parameters with tables in the order of ids."""
        dense, arrays = self.split(params)
        return self.join(dense, self._each(lambda table, x: table.layout.unplace(x), arrays))

    def init(self, arrays: dict) -> dict:
        """Returns the states of the optimizers."""
        return self._each(lambda table, x: table.layout.init(table.optimizer, x), arrays)

    @property
    def specs(self) -> dict:
        """The PartitionSpecs of the arrays, for a shard_map."""
        return self._each(lambda table: table.layout.spec)

    def state_specs(self, states: dict) -> dict:
        return self._each(lambda table, x: table.layout.state_specs(x), states)

    @property
    def can_catch_up(self) -> bool:
        """Whether entries may have missed steps; then `catch_up` must come before a whole table is read."""
        return any(isinstance(table.optimizer, CatchUpOptimizer) for table in self.tables.values())

    def catch_up(self, arrays: dict, states: dict) -> tuple[dict, dict]:
        """Returns (arrays, states) with all missed steps added, as evaluation needs them."""

        def caught_up(table, array, state):
            if not isinstance(table.optimizer, CatchUpOptimizer):
                return array, state
            return table.layout.catch_up(table.optimizer, array, state)

        return _unzip(self._each(caught_up, arrays, states), 2)

    def read(self, arrays: dict, states: dict, ids: dict) -> Reads:
        """Reads all lookups of a step; each distinct entry of a table is read once.

        ids: for each table, a pytree of int32 arrays, 0 = padding. An id outside the table reads as NaN.
        Raises: ValueError for unknown or missing names of tables, and for ids that are not int32.
        """
        if ids.keys() != self.tables.keys():
            raise ValueError(f"ids={sorted(ids)} must name all tables: {sorted(self.tables)} (Tables)")
        reads, local_ids = {}, {}
        for name, table in self.tables.items():
            types = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(ids[name])})
            if types != ["int32"]:
                raise ValueError(
                    f"ids[{name!r}] must be at least one int32 array, not {types or None} (Tables)"
                )
            flat_N, unravel = ravel_pytree(ids[name])
            ids_N = jnp.concatenate([jnp.zeros(1, jnp.int32), flat_N])  # layouts need id 0 first
            optimizer = None if table.is_dense else table.optimizer
            reads[name] = table.layout.read(optimizer, arrays[name], states[name], ids_N)
            local_ids[name] = unravel(reads[name].local_ids_N[1:])
        entries, entry_ids, rounds = (
            {name: getattr(read, field) for name, read in reads.items()}
            for field in ("entries_UD", "entry_ids", "rounds")
        )
        return Reads(entries, local_ids, entry_ids, rounds)

    def shards(self, arrays: dict) -> dict:
        """Returns {name: this device's shard} of the tables that a loss reads as a whole."""
        return {name: arrays[name] for name, table in self.tables.items() if table.is_dense}

    def sum_grads(self, reads: Reads, grads: dict, shard_grads: dict) -> tuple[Reads, dict]:
        """Returns (reads, grads) for `update`: gradients summed over devices, except for row-sharded tables,
        whose owners of entries sum them in `update`.

        grads: gradients of `reads.entries`. shard_grads: gradients of `shards`, complete on their device.
        """
        summed = self._each(lambda table, *read: table.layout.sum_grads(*read), reads.entry_ids, grads)
        entry_ids, grads = _unzip(summed, 2)
        for name, grads_vD in shard_grads.items():
            grads[name] = self[name].layout.scatter(entry_ids[name], grads[name]) + grads_vD
        return dataclasses.replace(reads, entry_ids=entry_ids), grads

    def sum_squares(self, reads: Reads, grads: dict) -> jax.Array | float:
        """f32 scalar: the sum of all squared gradients. Row-sharded tables need a separate exchange for it.

        reads, grads: from `sum_grads`.
        """

        def squares(table, entry_ids, grads):
            if table.is_dense:
                return jax.lax.psum(jnp.sum(grads**2), AXES)
            return table.layout.sum_squares(entry_ids, grads)

        return sum(self._each(squares, reads.entry_ids, grads).values())

    def update(self, arrays: dict, states: dict, reads: Reads, grads: dict) -> tuple[dict, dict, jax.Array]:
        """Returns (arrays, states, sum of all squared gradients) after one step.

        reads, grads: from `sum_grads`. Entry 0 is always among the entries read.
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
        """Returns {name: function(table, the values of the dicts for this name)}."""
        for given in dicts:
            if given.keys() != self.tables.keys():
                raise ValueError(
                    f"the names {sorted(given)} must be those of all tables: {sorted(self.tables)} (Tables)"
                )
        return {name: function(table, *(d[name] for d in dicts)) for name, table in self.tables.items()}


def _unzip(by_name: dict, num: int) -> tuple[dict, ...]:
    return tuple({name: values[i] for name, values in by_name.items()} for i in range(num))
