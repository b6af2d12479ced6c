"""Embedding tables: plain, composed of small tables, hashed; bags of several ids.

    rows = module.rows(ids)                     int32[..., k], for QuotientRemainder and MultiHash
    module.combine(table_VD[rows])              what module(ids) returns, [..., D]

So a trainer that updates only touched rows (`rec_jax.tables.sparse`) can read the rows itself.
"""

import hashlib
from typing import Literal

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.hashing import mix

_SLICE_ELEMENTS = 2**24
_NORMAL = nnx.initializers.normal(0.02)
_NO_BAG = np.iinfo(np.int32).max  # beyond any number of bags


def sliced(init):
    """An initializer that draws a large table in slices of rows, for drawing needs several times the room of
    what is drawn. Tables of one slice are drawn as `init` does."""

    def draw(key, shape, dtype, *args, **kwargs):
        num_rows, dim = shape
        rows = max(1, _SLICE_ELEMENTS // dim)
        if num_rows <= rows:
            return init(key, shape, dtype, *args, **kwargs)
        keys = jax.random.split(key, -(-num_rows // rows))

        def fill(i, table):  # the last slice is moved back inside the table
            values = init(keys[i], (rows, dim), dtype, *args, **kwargs)
            return jax.lax.dynamic_update_slice(table, values, (jnp.minimum(i * rows, num_rows - rows), 0))

        return jax.lax.fori_loop(0, len(keys), fill, jnp.zeros(shape, dtype))

    return draw


class Embedding(nnx.Module):
    """A table `embedding` [num_rows, dim]. An id outside [0, num_rows) reads as a row of NaN, so that the
    loss shows it; a negative one does not count from the end."""

    def __init__(self, num_rows: int, dim: int, *, init=_NORMAL, rngs: nnx.Rngs):
        self.embedding = nnx.Param(sliced(init)(rngs.params(), (num_rows, dim), jnp.float32))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids: integers [...]. Returns rows [..., dim]."""
        return _lookup(self.embedding[...], ids)


def _lookup(table_VD, ids):
    """table_VD: an array; or, from a compressed model, an object with `rows(ids)`."""
    if not isinstance(table_VD, jax.Array):
        return table_VD.rows(ids)
    return table_VD.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class QuotientRemainder(nnx.Module):
    """Ids 0..num_ids - 1 out of two small tables: the row of id // num_remainders and that of
    id % num_remainders, multiplied (or added) element by element. No two ids have the same pair of rows.

    Both tables lie in one parameter `embedding`, the ceil(num_ids / num_remainders) rows of the quotients
    first. num_remainders near sqrt(num_ids) takes the fewest rows. An id outside [0, num_ids) reads as NaN.

    A product is the default because sums say less: with h . (q + r) = h . q + h . r, a user who prefers
    remainder r to s does so for every quotient. Rows are drawn so that a vector's elements have a standard
    deviation of `std`; factors near one instead would start all ids of a quotient at nearly the same vector.

    Source: Shi et al., KDD'20 (arXiv 1909.02107). Differs: normal initial values.
    """

    def __init__(
        self,
        num_ids: int,
        num_remainders: int,
        dim: int,
        *,
        operation: Literal["product", "sum"] = "product",
        std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        if not 1 <= num_remainders <= num_ids:
            raise ValueError(
                f"num_remainders={num_remainders} must be from 1 to num_ids={num_ids} (QuotientRemainder)"
            )
        if operation not in ("product", "sum"):
            raise ValueError(f"operation={operation!r}: use product or sum (QuotientRemainder)")
        self.num_ids, self.num_remainders, self.operation = num_ids, num_remainders, operation
        self.num_quotients = -(-num_ids // num_remainders)
        self.num_rows = self.num_quotients + num_remainders
        init = nnx.initializers.normal(std**0.5 if operation == "product" else std / 2**0.5)
        self.embedding = nnx.Param(sliced(init)(rngs.params(), (self.num_rows, dim), jnp.float32))

    def rows(self, ids: jax.Array) -> jax.Array:
        """int32[..., 2]; num_rows, which is no row, for an id that is none."""
        quotient, remainder = ids // self.num_remainders, ids % self.num_remainders
        pair = jnp.stack([quotient, self.num_quotients + remainder], -1)
        is_id = (ids >= 0) & (ids < self.num_ids)
        return jnp.where(is_id[..., None], pair, self.num_rows).astype(jnp.int32)

    def combine(self, rows_kD: jax.Array) -> jax.Array:
        """[..., 2, dim] -> [..., dim]."""
        return (jnp.prod if self.operation == "product" else jnp.sum)(rows_kD, axis=-2)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids: integers [...]. Returns vectors [..., dim]."""
        return self.combine(_lookup(self.embedding[...], self.rows(ids)))


class MultiHash(nnx.Module):
    """Any int32 id out of a table `embedding` [num_rows, dim]: the sum of k rows, each by its own hash.

    Two ids share all of their rows about k! / num_rows**(k - 1) times as often as under one hash. Id 0
    is row 0, which no other id has. A vector's elements start with a standard deviation of `std`.

    Source: hash embeddings, Svenstrup et al., NIPS'17 (arXiv 1709.03933). Differs: a plain sum, for their
    importance weights are a table with a row for every id.
    """

    def __init__(self, num_rows: int, dim: int, k: int = 2, *, std: float = 0.02, rngs: nnx.Rngs):
        if k < 1:
            raise ValueError(f"k={k} must be at least 1 (MultiHash)")
        _check_room(num_rows)
        self.num_rows, self.k = num_rows, k
        init = nnx.initializers.normal(std / k**0.5)
        self.embedding = nnx.Param(sliced(init)(rngs.params(), (num_rows, dim), jnp.float32))

    def rows(self, ids: jax.Array) -> jax.Array:
        """int32[..., k]."""
        return jnp.stack([hash_ids(ids, self.num_rows, seed) for seed in range(self.k)], -1)

    def combine(self, rows_kD: jax.Array) -> jax.Array:
        """[..., k, dim] -> [..., dim]."""
        return jnp.sum(rows_kD, axis=-2)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids: integers [...]. Returns vectors [..., dim]."""
        return self.combine(_lookup(self.embedding[...], self.rows(ids)))


def hash_ids(ids: jax.Array, num_rows: int, seed: int = 0) -> jax.Array:
    """Rows of a table for any 32-bit ids [...]: int32 in [1, num_rows), and row 0 for id 0 (padding).

    Two ids have the same row with a probability of 1 / (num_rows - 1), independently for each seed.

    Raises: ValueError for host ids beyond 32 bits, which a device would cut silently.
    """
    _check_room(num_rows)
    if not isinstance(ids, jax.Array):
        ids = _int32(ids)
    # The seed is mixed too: of pairs that share one of 1,024 rows under key 0, 15 times too many do under 1.
    hashed = mix(ids, mix(seed)) % jnp.uint32(num_rows - 1)
    return jnp.where(ids == 0, 0, 1 + hashed.astype(jnp.int32))


def hash_strings(strings, num_rows: int, seed: int = 0) -> np.ndarray:
    """Rows of a table for N strings, on the host: int32[N] in [1, num_rows), and row 0 for "" (missing).

    The same on every machine and in every process, unlike Python's `hash`.
    """
    _check_room(num_rows)
    salt = seed.to_bytes(8, "little")

    def row(text: str) -> int:
        digest = hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest()
        return 1 + int.from_bytes(digest, "little") % (num_rows - 1) if text else 0

    return np.array([row(text) for text in strings], np.int32)


def _check_room(num_rows: int):
    if num_rows < 2:
        raise ValueError(f"num_rows={num_rows} must be at least 2: row 0 is padding, no id is hashed to it")


def collision_statistics(rows, num_rows: int) -> dict[str, float]:
    """How often hashed ids share a row, on the host: tells a bad hash from a small table.

    rows: int[N] in [0, num_rows), of N distinct ids; those on row 0 (padding) are left out.
    Returns ids; rows_used; ids_in_collision, those that share their row; max_ids_per_row; and
    expected_ids_in_collision = n (1 - (1 - 1/m)^(n - 1)), of n ids that a uniform hash spreads over
    m = num_rows - 1 rows. Far more than expected is a bad hash.
    """
    _check_room(num_rows)
    rows = np.asarray(rows)
    if rows.size and not (0 <= rows.min() and rows.max() < num_rows):
        raise ValueError(f"rows from {rows.min()} to {rows.max()} must be in [0, num_rows={num_rows})")
    rows = rows[rows != 0].astype(np.int64)
    _, counts = np.unique(rows, return_counts=True)
    share_alone = (1 - 1 / (num_rows - 1)) ** max(0, rows.size - 1)
    return {
        "ids": rows.size,
        "rows_used": counts.size,
        "ids_in_collision": int(counts[counts > 1].sum()),
        "max_ids_per_row": int(counts.max(initial=0)),
        "expected_ids_in_collision": rows.size * (1 - share_alone),
    }


def ragged(lists, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids, one a bag, as arrays of a fixed size, on the host.

    Returns (ids int32[capacity], bags int32[capacity]): the bag of each id counts from 0; what is left over
    is id 0 in a bag beyond any that `bag` is asked for.

    Raises: ValueError if they do not fit.
    """
    lengths = np.array([len(ids) for ids in lists], np.int64)
    total = int(lengths.sum())
    if total > capacity:
        raise ValueError(f"capacity={capacity} does not hold the {total} ids of {len(lengths)} lists")
    ids, bags = np.zeros(capacity, np.int32), np.full(capacity, _NO_BAG, np.int32)
    ids[:total] = _int32(np.concatenate([x for x in lists if len(x)] or [[]]))
    bags[:total] = np.repeat(np.arange(len(lengths)), lengths)
    return ids, bags


def _int32(ids) -> np.ndarray:
    """Host ids as int32; an error for what would be cut."""
    ids = np.asarray(ids)
    if ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"ids of type {ids.dtype} must be integers")
    limits = np.iinfo(np.int32)
    if ids.size and not (limits.min <= ids.min() and ids.max() <= limits.max):
        raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit 32 bits: use hash_strings")
    return ids.astype(np.int32)


def bag(
    rows_ND: jax.Array,
    bag_N: jax.Array,
    num_bags: int,
    *,
    weights_N: jax.Array | None = None,
    combine: Literal["sum", "mean"] = "sum",
) -> jax.Array:
    """Sums vectors by bag, for features with several values: [num_bags, D]. An empty bag is 0.

    rows_ND: the vectors of all ids. bag_N: int32[N], the bag of each, ascending; what is in none of the bags
    0..num_bags - 1 is left out. weights_N: of the vectors, 1 if None; "mean" divides by their sum in the bag
    and wants none below 0. Sums are in f32.
    """
    if combine not in ("sum", "mean"):
        raise ValueError(f"combine={combine!r}: use sum or mean (bag)")
    if weights_N is None:
        weights_N = jnp.ones(bag_N.shape)

    def sum_bags(x):
        return jax.ops.segment_sum(x, bag_N, num_bags, indices_are_sorted=True)

    sums_BD = sum_bags(rows_ND * weights_N.astype(jnp.float32)[:, None])
    if combine == "mean":
        total_B = sum_bags(weights_N.astype(jnp.float32))
        sums_BD = sums_BD / jnp.where(total_B == 0, 1, total_B)[:, None]
    return sums_BD.astype(rows_ND.dtype)


def reset_rows(table_VD: jax.Array, state, rows_U: jax.Array, key: jax.Array, init, optimizer=None) -> tuple:
    """Returns (table_VD, state) with those rows drawn anew, as if nothing had ever touched them.

    state: of the optimizer; of its arrays with V rows, these rows become 0, or with `optimizer` (an optax
    transformation) what its init gives: Adagrad's sums start above 0. rows_U: int32[U], distinct; those
    outside [0, V) are dropped, so that U can be fixed. init: as of `Embedding`.
    """
    num_rows, dim = table_VD.shape
    new_UD = init(key, (rows_U.size, dim), table_VD.dtype)

    fresh = jax.tree.map(lambda _: 0, state) if optimizer is None else optimizer.init(new_UD)

    def reset(leaf, new):
        if leaf.ndim == 0 or leaf.shape[0] != num_rows:
            return leaf
        return leaf.at[rows_U].set(new, mode="drop", wrap_negative_indices=False)

    return reset(table_VD, new_UD), jax.tree.map(reset, state, fresh)
