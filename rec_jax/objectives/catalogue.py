"""The item vectors of a catalogue, and their scores: exact ranks and top-k items.

Vectors and scores are on one device, or row-sharded over a mesh (see `tables/exchange.Placement`). With
sharding, each device scores its own items, and devices exchange only counts and their best items.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.nn.quantized import QuantizedTable, score_items
from rec_jax.objectives.softmax import sharded_softmax_cross_entropy, softmax_cross_entropy
from rec_jax.tables.exchange import AXES, Placement, shard_index

_MIN_FLOAT = jnp.finfo(jnp.float32).min


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ranks:
    """The rank of each query's target as counts, int[B]: items with a greater score, and items with an equal
    score, the target included. `greater` and `equal` leave out the items of the query's history; the
    `unfiltered` ones count them. num_nan: the number of NaN scores. top_BK: ids of the best items, 0 where no
    item is left. sampled_*: the counts among the sampled ids only."""

    greater: jax.Array
    equal: jax.Array
    greater_unfiltered: jax.Array
    equal_unfiltered: jax.Array
    num_nan: jax.Array
    top_BK: jax.Array
    sampled_greater: jax.Array | None = None
    sampled_equal: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Scores of all items for B queries.

    values_BV: f32[B, V + 1] in the order of ids; column 0 (padding) is not read. With a placement:
    f32[B, placement.size], one column per row of the row-sharded array, sharded as P(None, AXES). num_items:
    int32; ids above it are spare entries of a table that grows. None = all ids are items.
    """

    values_BV: jax.Array
    placement: Placement | None = field(default=None, metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})
    num_items: Any = None

    @partial(jax.jit, static_argnames=("top_k", "filter_seen"))
    def rank(self, targets_B, seen, sampled_BN=None, *, top_k: int, filter_seen: bool = True) -> Ranks:
        """Returns the exact rank of each target. All scores come from the same array, so that ties are exact.

        targets_B: ids. seen: (query indices int[P], ids int[P]), the items of each query's history; pairs
        with a query index of B or more are ignored. sampled_BN: ids of the sampled protocol. filter_seen:
        whether top_BK leaves out the items of the history.

        Items are excluded by a mask rather than by a score of -inf, because a model may itself return -inf,
        and such items are tied like any others. A target that is in the history is still ranked.
        """

        def part(columns, values_Bv, targets_B, seen_rows_P, seen_P, sampled_BN):
            rows_B, target_B = jnp.arange(len(values_Bv)), columns.of(targets_B)
            target_B1 = columns.get(values_Bv, targets_B[:, None])
            is_item_Bv = jnp.broadcast_to(columns.ids_v > 0, values_Bv.shape)
            is_unseen_Bv = is_item_Bv.at[seen_rows_P, columns.of(seen_P)].set(False, mode="drop")
            is_unseen_Bv = is_unseen_Bv.at[rows_B, target_B].set(True, mode="drop")
            above_Bv, level_Bv = values_Bv > target_B1, values_Bv == target_B1
            counts = _count_rows(
                above_Bv & is_unseen_Bv,
                level_Bv & is_unseen_Bv,
                above_Bv & is_item_Bv,
                level_Bv & is_item_Bv,
                jnp.isnan(values_Bv) & is_item_Bv,
            )
            is_listed_Bv = is_unseen_Bv if filter_seen else is_item_Bv
            finite_Bv = jnp.maximum(values_Bv, _MIN_FLOAT)  # ranks items that score -inf above excluded items
            best_BK, id_BK = columns.top_k(jnp.where(is_listed_Bv, finite_Bv, -jnp.inf), top_k)
            top_BK = jnp.where(best_BK == -jnp.inf, 0, id_BK)
            if sampled_BN is None:
                return Ranks(*columns.sum(counts), top_BK)
            values_BN = columns.get(values_Bv, sampled_BN)
            sampled = jnp.sum(values_BN > target_B1, -1), 1 + jnp.sum(values_BN == target_B1, -1)
            return Ranks(*columns.sum(counts), top_BK, *sampled)

        return self._map(part, targets_B, *seen, sampled_BN)

    @partial(jax.jit, static_argnames="k")
    def top_k(self, k: int, exclude=None, allowed_V=None) -> tuple[jax.Array, jax.Array]:
        """Returns (scores f32[B, k], ids int32[B, k]), exact, best first; -inf and id 0 if fewer than k items
        are left. Items that score -inf are not listed.

        exclude: (query indices int[P], ids int[P]), pairs to leave out; query indices of B or more are
        ignored. allowed_V: bool[V + 1], the items to choose from. Of equal scores the lower id comes first,
        unless the scores are sharded.
        """
        num_rows = self.placement.num_rows if self.placement else self.values_BV.shape[1]
        num = min(k, num_rows - 1)

        def part(columns, values_Bv, exclude, allowed_V):
            values_Bv = columns.items_only(values_Bv)
            if allowed_V is not None:
                values_Bv = jnp.where(allowed_V[columns.ids_v], values_Bv, -jnp.inf)
            if exclude is not None:
                values_Bv = values_Bv.at[exclude[0], columns.of(exclude[1])].set(-jnp.inf, mode="drop")
            best_BK, id_BK = columns.top_k(values_Bv, num)
            return best_BK, jnp.where(best_BK == -jnp.inf, 0, id_BK)

        best_BK, ids_BK = self._map(part, exclude, allowed_V)
        padding = (0, 0), (0, k - num)
        return jnp.pad(best_BK, padding, constant_values=-jnp.inf), jnp.pad(ids_BK, padding)

    def whole(self) -> jax.Array:
        """f32[B, V + 1] in the order of ids, on one device; column 0 is -inf."""
        if self.placement is None:
            return jnp.asarray(self.values_BV).at[:, 0].set(-jnp.inf)

        def in_order(values_BV):
            return self.placement.unplace(values_BV, axis=1).at[:, 0].set(-jnp.inf)

        gathered = jax.jit(in_order, out_shardings=NamedSharding(self.mesh, P()))(self.values_BV)
        return gathered.addressable_data(0)

    def _map(self, part, *args):
        """Calls part(columns, values_Bv, *args) once, or on every device with its own columns."""
        if self.placement is None:
            values_BV = self.values_BV.astype(jnp.float32)
            return part(_Columns(values_BV.shape[1], self.num_items), values_BV, *args)

        def local(values_Bv, num_items, *args):
            return part(_ShardColumns(values_Bv.shape[1], self.placement, num_items), values_Bv, *args)

        specs = P(None, AXES), P(), *(P() for _ in args)
        return jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=P(), check_vma=False)(
            self.values_BV, self.num_items, *args
        )


class _Columns:
    """All columns of an array of scores. ids_v: the id of each column, 0 for padding and spare entries."""

    def __init__(self, size: int, num_items=None):
        ids_v = jnp.arange(size)
        self._has_spare = num_items is not None
        self.ids_v = jnp.where(ids_v <= num_items, ids_v, 0) if self._has_spare else ids_v

    def of(self, ids):
        """The column of each id."""
        return ids

    def sum(self, x):
        """Sums over all devices."""
        return x

    def max(self, x):
        return x

    def items_only(self, values_Bv):
        """Sets the scores of padding and spare entries to -inf."""
        if self._has_spare:
            return jnp.where(self.ids_v > 0, values_Bv, -jnp.inf)
        return values_Bv.at[:, 0].set(-jnp.inf)

    def top_k(self, values_Bv, k: int):
        """Returns (scores, ids) of the k best columns over all devices."""
        return jax.lax.top_k(values_Bv, k)

    def get(self, values_Bv, ids_BN):
        """f32[B, N]: the scores of the given ids."""
        rows_B1 = jnp.arange(len(values_Bv))[:, None]
        return self.max(values_Bv.at[rows_B1, self.of(ids_BN)].get(mode="fill", fill_value=-jnp.inf))


class _ShardColumns(_Columns):
    """The columns of one device, inside a shard_map."""

    def __init__(self, size: int, placement: Placement, num_items=None):
        self._placement, self._size, self._first = placement, size, shard_index() * size
        ids_v = placement.to_ids(self._first + jnp.arange(size))
        last = placement.num_rows - 1 if num_items is None else num_items
        self.ids_v = jnp.where(ids_v <= last, ids_v, 0)

    def of(self, ids):
        """The column of each id; ids of other devices get the first column out of range."""
        columns = self._placement.to_physical(ids) - self._first
        return jnp.where((columns >= 0) & (columns < self._size), columns, self._size)

    def sum(self, x):
        return jax.lax.psum(x, AXES)

    def max(self, x):
        return jax.lax.pmax(x, AXES)

    def items_only(self, values_Bv):
        return jnp.where(self.ids_v > 0, values_Bv, -jnp.inf)

    def top_k(self, values_Bv, k: int):
        """Gathers only the k best columns of each device."""
        best_BK, column_BK = jax.lax.top_k(values_Bv, min(k, self._size))
        row_BK = column_BK + self._first
        best_BN, row_BN = (jax.lax.all_gather(x, AXES, axis=1, tiled=True) for x in (best_BK, row_BK))
        best_BK, index_BK = jax.lax.top_k(best_BN, k)
        return best_BK, self._placement.to_ids(jnp.take_along_axis(row_BN, index_BK, axis=1))


def _count_rows(*masks_BV):
    """int32[B] for each mask: its number of true values per query. One pass over all masks, because separate
    sums take ten times as long in XLA:CPU."""
    zeros = (jnp.int32(0),) * len(masks_BV)
    masks_BV = tuple(mask.astype(jnp.int32) for mask in masks_BV)
    return jax.lax.reduce(masks_BV, zeros, lambda sums, others: tuple(map(jnp.add, sums, others)), (1,))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Catalogue:
    """The vectors of all items. The score of an item is the dot product of its vector with a query.

    vectors: [V + 1, D], an array or a QuantizedTable; entry 0 is padding. With a placement: the row-sharded
    array [placement.size, D], sharded as P(AXES). num_items: as in `Scores`.
    """

    vectors: jax.Array | QuantizedTable
    placement: Placement | None = field(default=None, metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})
    num_items: Any = None

    @jax.jit
    def scores(self, x_BD) -> Scores:
        """The scores of all items, in f32."""
        scores_BV = score_items(x_BD, self.vectors)
        if self.placement is not None:
            sharding = NamedSharding(self.mesh, P(None, AXES))
            scores_BV = jax.lax.with_sharding_constraint(scores_BV, sharding)
        return Scores(scores_BV, self.placement, self.mesh, self.num_items)

    def cross_entropy(self, x_TD, targets_T, weights_T, bias_V=None) -> jax.Array:
        """Sum over tokens of weight * (log of the sum of exp(scores) - score of the target), an f32 scalar.

        targets_T: ids. bias_V: f32[V + 1], added to the scores. With a placement, call it inside a shard_map
        over both mesh axes: `vectors` are the entries of this device, and the tokens are those of its part of
        the batch. The gradient of `vectors` is then complete: it covers the tokens of all devices.
        """
        vectors_vD = self.vectors
        if self.placement is None:
            if bias_V is not None:
                x_TD, vectors_vD = _with_bias(x_TD, vectors_vD, bias_V)
            return softmax_cross_entropy(x_TD, vectors_vD, targets_T, weights_T)
        rows_v = shard_index() * len(vectors_vD) + jnp.arange(len(vectors_vD))
        if bias_V is not None:
            x_TD, vectors_vD = _with_bias(x_TD, vectors_vD, bias_V[self.placement.to_ids(rows_v)])
        is_real_v, rows_T = self.placement.is_real(rows_v), self.placement.to_physical(targets_T)
        return sharded_softmax_cross_entropy(x_TD, vectors_vD, is_real_v, rows_T, weights_T)


def _with_bias(x_TD, vectors_VD, bias_V):
    """Appends one dim whose product is the bias, so that a softmax over tiles adds it tile by tile."""
    x_TD = jnp.pad(x_TD, ((0, 0), (0, 1)), constant_values=1)
    return x_TD, jnp.concatenate([vectors_VD, bias_V[:, None].astype(vectors_VD.dtype)], axis=1)
