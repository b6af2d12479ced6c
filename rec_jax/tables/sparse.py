"""Updates of only those rows of a table that a batch has read.

    distinct = find_rows(ids_N, num_rows)                   distinct ids
    rows_UD = gather_rows(table_VD, distinct.rows_U)        what the model sees instead of the table
    rows_UD[distinct.place_N]                               the lookup
    table_VD, state = update_rows(optimizer, table_VD, state, distinct.rows_U, grads_UD)

Any optax transformation that works element by element or row by row will do: its state is gathered with the
rows and written back once, without duplicates, so that a donated table is changed in place. Cost follows the
number of distinct ids, not the size of the table.

SGD and Adagrad are exactly what they are with dense gradients. Adam is not: a dense Adam keeps moving a row
by its old momentum. With `optax.adam` the moments of an unread row rest ("lazy Adam"); `catch_up_adam` makes
up for the missed steps when a row is next read. A weight decay decays the rows of a step only.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rec_jax.hashing import mix

CHUNK_ELEMENTS = 2**18  # of an array of rows that a CPU updates at once: 1 MiB of f32


class DistinctIds(NamedTuple):
    """Distinct ids, and where each of N ids is among them."""

    rows_U: jax.Array  # int32[U], U = N: distinct; free places hold ids beyond the table
    local_ids_N: jax.Array  # int32[N]: rows_U[place_N] == ids_N


def find_rows(ids_N: jax.Array, num_rows: int) -> DistinctIds:
    """Distinct ids, in the order of their occurrence on a CPU, else sorted, for sorted writes: the fastest.

    ids_N: int32[N]. One outside [0, num_rows) reads as a row of NaN, so that the loss shows it.
    """
    return dedupe_by_hash(ids_N, num_rows) if _is_cpu() else dedupe(ids_N, num_rows)


def _is_cpu() -> bool:
    return jax.default_backend() == "cpu"


def dedupe(ids_N: jax.Array, num_rows: int) -> DistinctIds:
    """Distinct ids, sorted. Sorting and searching is 3.5 times faster on a CPU than `jnp.unique`, which sorts
    pairs."""
    ids_N = jnp.where((ids_N < 0) | (ids_N > num_rows), num_rows, ids_N).astype(jnp.int32)
    sorted_N = jnp.sort(ids_N)
    is_first_N = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])
    free_U = num_rows + 1 + jnp.arange(ids_N.size, dtype=jnp.int32)
    rows_U = free_U.at[jnp.cumsum(is_first_N) - 1].set(sorted_N)
    return DistinctIds(rows_U, jnp.searchsorted(rows_U, ids_N).astype(jnp.int32))


def dedupe_by_hash(ids_N: jax.Array, num_rows: int) -> DistinctIds:
    """Distinct ids, each in the place of its first occurrence; on a CPU in a third of the time of a sort.

    All ids of a slot of a hash table learn who was first there; those who find another id than their own try
    again under another hash. Each round settles one id a slot at least.
    """
    size = ids_N.size
    ids_N = jnp.where((ids_N < 0) | (ids_N > num_rows), num_rows, ids_N).astype(jnp.int32)
    own_N = jnp.arange(size, dtype=jnp.int32)
    bits = max(1, (4 * size - 1).bit_length())

    def one_round(state):
        local_ids_N, count = state
        slot_N = (mix(ids_N, mix(count)) >> (32 - bits)).astype(jnp.int32)
        slot_N = jnp.where(local_ids_N == size, slot_N, 2**bits)  # who is settled takes no part
        first = jnp.full(2**bits, size, jnp.int32).at[slot_N].min(own_N, mode="drop")
        first_N = jnp.minimum(first.at[slot_N].get(mode="clip"), size - 1)
        is_mine_N = (local_ids_N == size) & (ids_N[first_N] == ids_N)
        return jnp.where(is_mine_N, first_N, local_ids_N), count + 1

    def is_open(state):
        return jnp.any(state[0] == size)

    local_ids_N, _ = jax.lax.while_loop(is_open, one_round, (jnp.full(size, size, jnp.int32), jnp.uint32(0)))
    return DistinctIds(jnp.where(local_ids_N == own_N, ids_N, num_rows + 1 + own_N), local_ids_N)


def gather_rows(table_VD: jax.Array, rows_U: jax.Array) -> jax.Array:
    """The rows of the table at rows_U [...]; an id that is no row (V) reads as NaN, free places as anything.

    Arrays of one dim (a number a row) and of integers are gathered as they are, ids that are no rows too.

    The quotient is also what makes it fast. XLA:CPU unrolls a bare copy of up to some 80 numbers into scalar
    moves, which hide no memory latency, and moves a product away into whatever reads the rows; a division it
    neither repeats nor, as the divisor differs by column in form, turns into a product.
    """
    rows_UD = table_VD.at[rows_U].get(mode="clip")
    if table_VD.ndim == 1 or not jnp.issubdtype(table_VD.dtype, jnp.floating):
        return rows_UD
    num_rows, dim = table_VD.shape
    column_D = jnp.arange(dim, dtype=jnp.int32)
    is_bad_UD = rows_U[..., None] + column_D == num_rows + column_D
    return rows_UD / jnp.where(is_bad_UD, jnp.nan, 1).astype(table_VD.dtype)


def write_rows(table_VX: jax.Array, rows_U: jax.Array, rows_UX: jax.Array) -> jax.Array:
    """The table with those rows replaced; like `add_rows` it drops places beyond the table."""
    return table_VX.at[rows_U].set(
        rows_UX.astype(table_VX.dtype), mode="drop", indices_are_sorted=not _is_cpu(), unique_indices=True
    )


def add_rows(table_VD: jax.Array, rows_U: jax.Array, updates_UD: jax.Array) -> jax.Array:
    return table_VD.at[rows_U].add(
        updates_UD.astype(table_VD.dtype), mode="drop", indices_are_sorted=not _is_cpu(), unique_indices=True
    )


def is_rows(leaf, num_rows: int) -> bool:
    """Whether an array of an optimizer's state has a row for each row of the table."""
    return leaf.ndim > 0 and leaf.shape[0] == num_rows


def gather_state(state, rows_U: jax.Array, num_rows: int):
    """The state of some rows: arrays of num_rows rows gathered, others (counts) as they are."""
    return jax.tree.map(lambda leaf: gather_rows(leaf, rows_U) if is_rows(leaf, num_rows) else leaf, state)


def read_rows(optimizer, table_VD, state, rows_U) -> jax.Array:
    """The rows as a model should see them: with the steps made up for that a `RowOptimizer` has missed."""
    rows_UD = gather_rows(table_VD, rows_U)
    if not isinstance(optimizer, RowOptimizer):
        return rows_UD
    return rows_UD + optimizer.missed(gather_state(state, rows_U, table_VD.shape[0]))[0]


def update_rows(optimizer, table_VD, state, rows_U, grads_UD) -> tuple:
    """Returns (table_VD, state) after one step of an optax transformation on the rows that a batch reads.

    state: `optimizer.init(table_VD)`. grads_UD: with respect to the rows. A CPU takes rows with moments a
    chunk at a time, so that they stay in its caches and no step asks the system for memory.
    """
    num_rows, dim = table_VD.shape
    chunk = max(1, CHUNK_ELEMENTS // dim)
    has_moments = any(is_rows(leaf, num_rows) and leaf.ndim > 1 for leaf in jax.tree.leaves(state))
    if not (_is_cpu() and has_moments and rows_U.size > chunk):
        return _update_at_once(optimizer, table_VD, state, rows_U, grads_UD)
    num_chunks = -(-rows_U.size // chunk)
    missing, last = num_chunks * chunk - rows_U.size, num_rows + 1 + rows_U.size  # beyond all free places
    rows_U = jnp.concatenate([rows_U, last + jnp.arange(missing, dtype=rows_U.dtype)])
    grads_UD = jnp.pad(grads_UD, [(0, missing), (0, 0)])

    def one_chunk(carry, chunk):
        table_VD, new_state = carry
        new_state = with_counts_of(state, new_state, num_rows)
        return _update_at_once(optimizer, table_VD, new_state, *chunk), None

    chunks = rows_U.reshape(num_chunks, -1), grads_UD.reshape(num_chunks, -1, dim)
    return jax.lax.scan(one_chunk, (table_VD, state), chunks)[0]


def with_counts_of(before, state, num_rows: int):
    """The state of rows with the counts from before the step, which takes several updates of other rows."""
    return jax.tree.map(lambda old, new: new if is_rows(new, num_rows) else old, before, state)


def _update_at_once(optimizer, table_VD, state, rows_U, grads_UD) -> tuple:
    num_rows = table_VD.shape[0]
    rows_UD = gather_rows(table_VD, rows_U)  # dropped by compilers where no parameter is looked at
    updates_UD, state_U = optimizer.update(grads_UD, gather_state(state, rows_U, num_rows), rows_UD)
    state = jax.tree.map(
        lambda leaf, new: write_rows(leaf, rows_U, new) if is_rows(leaf, num_rows) else new, state, state_U
    )
    return add_rows(table_VD, rows_U, updates_UD), state


class RowwiseAdagradState(NamedTuple):
    sum_V: jax.Array  # of the mean squares of a row's gradients


def scale_by_rowwise_rss(eps: float = 1e-8, axis: str | None = None) -> optax.GradientTransformation:
    """Adagrad with one accumulator a row, g / (sqrt(sum of mean squares) + eps).

    axis: the mesh axis that the dims of a row are split over, if any.
    Source: the "exact row-wise Adagrad" of FBGEMM's table-batched embeddings.
    """

    def init(table_VD):
        return RowwiseAdagradState(jnp.zeros(table_VD.shape[0], jnp.float32))

    def update(grads, state, params=None):
        squares = jnp.mean(grads.astype(jnp.float32) ** 2, axis=-1)
        sums = state.sum_V + (squares if axis is None else jax.lax.pmean(squares, axis))
        return grads / (jnp.sqrt(sums) + eps)[:, None], RowwiseAdagradState(sums)

    return optax.GradientTransformation(init, update)


class RowOptimizer(NamedTuple):
    """An optax transformation that knows what rows have missed while nothing touched them.

    missed(state of some rows) -> (what is to be added to these rows before they are read, the state once it
    has been added). `update` begins with it.
    """

    init: Callable
    update: Callable
    missed: Callable


class CatchUpAdamState(NamedTuple):
    count: jax.Array  # int32 scalar: steps taken
    last_V: jax.Array  # int32[V]: the step after which the moments of a row hold; 0 = never touched
    mu_VD: jax.Array
    nu_VD: jax.Array


def catch_up_adam(learning_rate: optax.Schedule, b1=0.9, b2=0.999, eps: float = 1e-8) -> RowOptimizer:
    """Adam for sparse updates that moves a row, when it is next read, as far as dense Adam would have
    meanwhile.

    While nothing touches a row, both moments decay and dense Adam makes the steps
    -rate r**j mu / sqrt(nu), r = b1 / sqrt(b2), j = 1, 2, ..., but for the bias corrections and eps: a
    geometric series. Differs from dense Adam: the bias corrections are those at the weighted mean of the
    missed steps (together within 2 % of the exact sum from step 10 on, 0.1 % from step 100, 13 % at step 1),
    the learning rate is that of the catching up, and eps does not grow against the decaying sqrt(nu).
    """
    r = b1 / b2**0.5
    if r >= 1:
        raise ValueError(f"b1={b1} must be less than sqrt(b2)={b2**0.5:.4f}, or old momentum never fades")

    def init(table_VD):
        zeros = jnp.zeros_like(table_VD)
        return CatchUpAdamState(jnp.zeros((), jnp.int32), jnp.zeros(len(table_VD), jnp.int32), zeros, zeros)

    def missed(state):
        k = (state.count - state.last_V).astype(jnp.float32)
        left = r**k
        mean = jnp.where(k > 0, (1 - (k + 1) * left + k * left * r) / ((1 - r) * (1 - left)), 1)
        at = state.last_V + mean
        steps = r * (1 - left) / (1 - r) * jnp.sqrt(1 - b2**at) / (1 - b1**at)
        updates = -learning_rate(state.count) * steps[:, None] * state.mu_VD / (jnp.sqrt(state.nu_VD) + eps)
        mu, nu = (b ** k[:, None] * x for b, x in ((b1, state.mu_VD), (b2, state.nu_VD)))
        # A constant would not depend on what was gathered, and XLA would copy the array to be safe.
        return updates, CatchUpAdamState(state.count, jnp.maximum(state.last_V, state.count), mu, nu)

    def update(grads, state, params=None):
        old, state = missed(state)
        count = state.count + 1
        mu = b1 * state.mu_VD + (1 - b1) * grads
        nu = b2 * state.nu_VD + (1 - b2) * grads**2
        step = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
        state = CatchUpAdamState(count, jnp.maximum(state.last_V, count), mu, nu)
        return old - learning_rate(count - 1) * step, state

    return RowOptimizer(init, update, missed)
