"""Sparse updates of the entries a batch reads, against optax with dense gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rec_jax.tables import sparse as sparse_lib
from rec_jax.tables.sparse import (
    catch_up_adam,
    dedupe,
    dedupe_by_hash,
    gather_entries,
    read_entries,
    scale_by_rowwise_rss,
    update_entries,
    write_entries,
)

V, D, N = 50, 4, 12
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
sorted_ids = jax.jit(dedupe, static_argnums=1)
hashed_ids = jax.jit(dedupe_by_hash, static_argnums=1)


def batches(steps, high=V):
    for _ in range(steps):
        yield RNG.integers(0, high, N).astype(np.int32), RNG.normal(size=(N, D)).astype(np.float32)


def sine_grads(step):
    return np.sin(np.arange(N * D, dtype=np.float32).reshape(N, D) + step)


@pytest.mark.parametrize(
    "ids", [[3], [7, 7, 7, 7], [5, 1, 3, 2], [0, V - 1, 0, V - 1], [4, 4, 2, 9]], ids=str
)
def test_distinct_ids_are_sorted_and_local_ids_point_to_them(ids):
    distinct = sorted_ids(np.array(ids, np.int32), V)
    expected, local_ids = np.unique(ids, return_inverse=True)
    entry_ids_U = np.asarray(distinct.entry_ids_U)
    count = np.sum(entry_ids_U < V)
    assert count == len(expected)
    np.testing.assert_array_equal(entry_ids_U[:count], expected)
    np.testing.assert_array_equal(distinct.local_ids_N, local_ids)
    assert (np.diff(entry_ids_U) > 0).all() and (entry_ids_U[count:] > V).all()


@pytest.mark.parametrize(
    "ids",
    [
        [3],
        np.full(3000, 7),
        RNG.integers(0, 10**6, 3000),
        RNG.permutation(3000),
        np.arange(3000) * 2**18,
        np.minimum(RNG.zipf(1.2, 3000), 10**6),
        np.resize([0, 2, 0, -1, 10**6, 2, 10**6 + 5], 3000),
    ],
    ids=["one", "the same", "uniform", "distinct", "high bits", "zipf", "invalid"],
)
def test_hashing_finds_the_same_distinct_ids_as_sorting(ids):
    num_rows = 10**6
    by_sort, by_hash = (
        jax.tree.map(np.asarray, find(np.asarray(ids, np.int32), num_rows))
        for find in (sorted_ids, hashed_ids)
    )
    np.testing.assert_array_equal(
        by_hash.entry_ids_U[by_hash.local_ids_N], by_sort.entry_ids_U[by_sort.local_ids_N]
    )
    np.testing.assert_array_equal(
        np.sort(by_hash.entry_ids_U[by_hash.entry_ids_U <= num_rows]),
        by_sort.entry_ids_U[by_sort.entry_ids_U <= num_rows],
    )
    assert len(np.unique(by_hash.entry_ids_U)) == len(ids)


@jax.jit
def read_and_write(ids_N):
    """Returns (the entries of the ids, the table after writing 9 to these entries)."""
    distinct = dedupe(ids_N, V)
    entries_UD = gather_entries(TABLE, distinct.entry_ids_U)
    return entries_UD[distinct.local_ids_N], write_entries(TABLE, distinct.entry_ids_U, entries_UD * 0 + 9)


@pytest.mark.parametrize("invalid", [-1, V, V + 3, -V, 2**31 - 1, -(2**31)])
def test_invalid_id_reads_as_nan_and_is_never_written(invalid):
    looked_up, written = (np.asarray(x) for x in read_and_write(np.array([2, invalid, 5, 2], np.int32)))
    assert np.isnan(looked_up[1]).all()
    np.testing.assert_array_equal(looked_up[[0, 2, 3]], TABLE[np.array([2, 5, 2])])
    changed = np.flatnonzero((written != np.asarray(TABLE)).any(-1))
    np.testing.assert_array_equal(changed, [2, 5])


def dense(optimizer, table, state, ids, grads_ND):
    grads_VD = jnp.zeros_like(table).at[ids].add(grads_ND)
    updates, state = optimizer.update(grads_VD, state, table)
    return optax.apply_updates(table, updates), state


def sparse(optimizer, table, state, ids, grads_ND):
    distinct = dedupe(ids, V)
    entries_UD = gather_entries(table, distinct.entry_ids_U)
    grads_UD = jnp.zeros_like(entries_UD).at[distinct.local_ids_N].add(grads_ND)
    return update_entries(optimizer, table, state, distinct.entry_ids_U, grads_UD)


@functools.cache
def compiled(step, optimizer):
    return jax.jit(functools.partial(step, optimizer))


EXACT = {
    "sgd": optax.sgd(0.1),
    "adagrad": optax.adagrad(0.1),
    "rowwise_adagrad": optax.chain(scale_by_rowwise_rss(), optax.scale_by_learning_rate(0.1)),
    "scheduled": optax.sgd(optax.linear_schedule(1.0, 0.0, 10)),
}


@pytest.mark.parametrize("name", EXACT)
def test_equals_dense_gradients(name):
    optimizer = EXACT[name]
    states = {step: (TABLE, optimizer.init(TABLE)) for step in (dense, sparse)}
    for ids, grads in batches(8):
        for step, (table, state) in states.items():
            states[step] = compiled(step, optimizer)(table, state, ids, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *states.values())
    assert not np.allclose(states[dense][0], TABLE)


# 12 and more entries fit into one chunk.
@pytest.mark.parametrize("chunk_entries", [1, 5, 12])
def test_chunks_change_nothing(chunk_entries, monkeypatch):
    """Checks counts, moments and, for 5, a last chunk that is not full."""
    optimizer = optax.chain(
        optax.scale_by_adam(), optax.scale_by_learning_rate(lambda step: 0.1 / (1 + step))
    )
    ids = np.array([3, 7, 3, V - 1, 0, 5, 5, 9, 1, 2, 30, V], np.int32)
    results = []
    for entries in (1000, chunk_entries):
        monkeypatch.setattr(sparse_lib, "CHUNK_ELEMENTS", entries * D)
        update = jax.jit(functools.partial(sparse, optimizer))
        table, state = TABLE, optimizer.init(TABLE)
        for step in range(3):
            table, state = update(table, state, ids, sine_grads(step))
        results.append((table, state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *results)
    assert results[1][1][0].count == 3 and not np.allclose(results[1][0], TABLE)


def test_lazy_adam_equals_adam_for_entries_read_at_every_step_and_keeps_others():
    optimizer = optax.adam(0.1)
    results = {}
    for step in (dense, sparse):
        table, state = TABLE, optimizer.init(TABLE)
        for i in range(5):
            ids = np.arange(N, dtype=np.int32) // 2
            table, state = compiled(step, optimizer)(table, state, ids, sine_grads(i))
        results[step] = np.asarray(table)
    np.testing.assert_allclose(results[sparse], results[dense], rtol=1e-5, atol=1e-6)

    ones = np.ones((N, D), np.float32)
    three, four = (np.full(N, i, np.int32) for i in (3, 4))
    table, state = compiled(sparse, optimizer)(TABLE, optimizer.init(TABLE), three, ones)
    lazy, _ = compiled(sparse, optimizer)(table, state, four, ones)
    np.testing.assert_array_equal(lazy[3], table[3])
    moved, _ = compiled(dense, optimizer)(table, state, four, ones)
    assert not np.allclose(moved[3], table[3])


def test_rowwise_adagrad_by_hand():
    optimizer = scale_by_rowwise_rss(eps=0.0)
    grads = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    updates, state = optimizer.update(grads, optimizer.init(jnp.zeros((2, 2))))
    np.testing.assert_allclose(state.sum_V, [12.5, 0.5])
    np.testing.assert_allclose(updates, grads / np.sqrt([[12.5], [0.5]]), rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), catch_up_adam(optax.constant_schedule(0.1))])
def test_table_is_changed_in_place_without_temporaries_of_its_size(optimizer):
    num_rows, dim = 100_000, 16
    table = jax.ShapeDtypeStruct((num_rows, dim), jnp.float32)
    state = jax.eval_shape(optimizer.init, table)
    args = (jax.ShapeDtypeStruct((N,), jnp.int32), jax.ShapeDtypeStruct((N, dim), jnp.float32))

    def step(table, state, ids, grads):
        distinct = dedupe(ids, num_rows)
        entries_UD = gather_entries(table, distinct.entry_ids_U)
        grads_UD = jnp.zeros_like(entries_UD).at[distinct.local_ids_N].add(grads)
        return update_entries(optimizer, table, state, distinct.entry_ids_U, grads_UD)

    memory = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, *args).compile().memory_analysis()
    table_bytes = num_rows * dim * 4
    assert memory.alias_size_in_bytes >= 3 * table_bytes
    assert memory.temp_size_in_bytes < table_bytes / 100


def test_adam_with_catch_up_follows_dense_adam():
    """Entry 3 is read at every tenth step only; momentum moves it in between."""
    ours = catch_up_adam(optax.constant_schedule(0.01), b2=0.98)
    adam = optax.adam(0.01, b2=0.98)
    updates = {
        "ours": compiled(sparse, ours), "exact": compiled(dense, adam), "lazy": compiled(sparse, adam)
    }  # fmt: skip
    tables = dict.fromkeys(updates, TABLE)
    states = {"ours": ours.init(TABLE), "exact": adam.init(TABLE), "lazy": adam.init(TABLE)}
    for step in range(101):
        entry = 3 if step % 10 == 0 else 4 + step % 10
        batch = np.array([entry], np.int32), RNG.normal(1, 1, (1, D)).astype(np.float32)
        for name, update in updates.items():
            tables[name], states[name] = update(tables[name], states[name], *batch)
    read = jax.jit(functools.partial(read_entries, ours))
    entries = read(tables["ours"], states["ours"], np.arange(V, dtype=np.int32))
    moved = np.asarray(tables["exact"] - TABLE)
    error, lazy_error = np.asarray(entries - tables["exact"]), np.asarray(tables["lazy"] - tables["exact"])
    updated = slice(3, 14)
    assert np.abs(error[updated]).max() < 0.02 * np.abs(moved[updated]).max()
    assert np.abs(error[updated]).max() < 0.05 * np.abs(lazy_error[updated]).max()
    unread = np.r_[0:3, 14:V]
    np.testing.assert_array_equal(np.asarray(entries)[unread], TABLE[unread])
    # After catching up, no step is missed, and the next update gives the same result.
    missed_steps = jax.jit(ours.missed)
    missed, caught_up = missed_steps(states["ours"])
    again, _ = missed_steps(caught_up)
    assert not np.asarray(again).any()
    batch = np.array([3], np.int32), np.ones((1, D), np.float32)
    one, state_one = updates["ours"](tables["ours"], states["ours"], *batch)
    two, state_two = updates["ours"](tables["ours"] + missed, caught_up, *batch)
    np.testing.assert_allclose(one[3], two[3], rtol=1e-6)
    np.testing.assert_allclose(state_one.mu_VD[3], state_two.mu_VD[3], rtol=1e-6)


def test_momentum_that_never_decays_is_refused():
    with pytest.raises(ValueError, match="b1=0.99"):
        catch_up_adam(optax.constant_schedule(0.1), b1=0.99, b2=0.9)


def test_weight_decay_applies_only_to_the_entries_read():
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.scale(-1.0))
    update, zeros = compiled(sparse, optimizer), np.zeros((2, D), np.float32)
    table, _ = update(TABLE, optimizer.init(TABLE), np.array([2, 2], np.int32), zeros)
    np.testing.assert_allclose(table[2], TABLE[2] / 2, rtol=1e-6)
    np.testing.assert_array_equal(np.delete(table, 2, axis=0), np.delete(TABLE, 2, axis=0))
