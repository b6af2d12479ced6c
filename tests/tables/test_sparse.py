"""Updates of touched rows against optax with dense gradients."""

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
    update_rows,
    write_entries,
)

V, D, N = 50, 4, 12
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)


def batches(steps, high=V):
    for _ in range(steps):
        ids = jnp.asarray(RNG.integers(0, high, N), jnp.int32)
        yield ids, jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)


@pytest.mark.parametrize(
    "ids", [[3], [7, 7, 7, 7], [5, 1, 3, 2, 0], [0, V - 1, 0, V - 1], [4, 4, 2, 9, 2]], ids=str
)
def test_distinct_ids_and_their_places(ids):
    distinct = dedupe(jnp.array(ids), V)
    expected, place = np.unique(ids, return_inverse=True)
    count = int((distinct.rows_U < V).sum())
    assert count == len(expected)
    np.testing.assert_array_equal(distinct.rows_U[:count], expected)
    np.testing.assert_array_equal(distinct.local_ids_N, place)
    assert (np.diff(distinct.rows_U) > 0).all() and (np.asarray(distinct.rows_U[count:]) > V).all()


@pytest.mark.parametrize(
    "ids",
    [
        [3],
        [7] * 50,
        RNG.integers(0, 10**6, 3000),
        RNG.permutation(3000),
        np.arange(3000) * 2**18,
        np.minimum(RNG.zipf(1.2, 3000), 10**6),
        [0, 2, 0, -1, 10**6, 2, 10**6 + 5],
    ],
    ids=["one", "the same", "uniform", "distinct", "high bits", "zipf", "bad ones"],
)
def test_hashing_finds_the_distinct_ids_that_sorting_does(ids):
    num_rows = 10**6
    by_sort, by_hash = (
        jax.tree.map(np.asarray, find(np.asarray(ids, np.int32), num_rows))
        for find in (dedupe, jax.jit(dedupe_by_hash, static_argnums=1))
    )
    np.testing.assert_array_equal(by_hash.rows_U[by_hash.local_ids_N], by_sort.rows_U[by_sort.local_ids_N])
    np.testing.assert_array_equal(
        np.sort(by_hash.rows_U[by_hash.rows_U <= num_rows]), by_sort.rows_U[by_sort.rows_U <= num_rows]
    )
    assert len(np.unique(by_hash.rows_U)) == len(ids)


@pytest.mark.parametrize("bad", [-1, V, V + 3, -V, 2**31 - 1, -(2**31)])
def test_an_id_that_is_no_row_reads_as_nan_and_is_never_written(bad):
    distinct = dedupe(jnp.array([2, bad, 5, 2]), V)
    rows = gather_entries(TABLE, distinct.rows_U)
    looked_up = np.asarray(rows[distinct.local_ids_N])
    assert np.isnan(looked_up[1]).all()
    np.testing.assert_array_equal(looked_up[[0, 2, 3]], TABLE[np.array([2, 5, 2])])
    written = np.asarray(write_entries(TABLE, distinct.rows_U, rows * 0 + 9))
    changed = np.flatnonzero((written != np.asarray(TABLE)).any(-1))
    np.testing.assert_array_equal(changed, [2, 5])


def dense(optimizer, table, state, ids, grads_ND):
    grads_VD = jnp.zeros_like(table).at[ids].add(grads_ND)
    updates, state = optimizer.update(grads_VD, state, table)
    return optax.apply_updates(table, updates), state


def sparse(optimizer, table, state, ids, grads_ND):
    distinct = dedupe(ids, V)
    rows = gather_entries(table, distinct.rows_U)
    grads_UD = jax.grad(lambda rows: jnp.sum(rows[distinct.local_ids_N] * grads_ND))(rows)
    return update_rows(optimizer, table, state, distinct.rows_U, grads_UD)


EXACT = {
    "sgd": optax.sgd(0.1),
    "adagrad": optax.adagrad(0.1),
    "rowwise_adagrad": optax.chain(scale_by_rowwise_rss(), optax.scale_by_learning_rate(0.1)),
    "scheduled": optax.sgd(optax.linear_schedule(1.0, 0.0, 10)),
}


@pytest.mark.parametrize("name", EXACT)
def test_equal_to_dense_gradients(name):
    optimizer = EXACT[name]
    states = {step: (TABLE, optimizer.init(TABLE)) for step in (dense, sparse)}
    for ids, grads in batches(8):
        for step, (table, state) in states.items():
            states[step] = jax.jit(step, static_argnums=0)(optimizer, table, state, ids, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *states.values())
    assert not np.allclose(states[dense][0], TABLE)


@pytest.mark.parametrize("rows", [1, 5, 12, 13])
def test_chunks_of_rows_change_nothing(rows, monkeypatch):
    """With counts, moments and places left over."""
    optimizer = optax.chain(
        optax.scale_by_adam(), optax.scale_by_learning_rate(lambda step: 0.1 / (1 + step))
    )
    results = []
    for chunk_rows in (1000, rows):
        monkeypatch.setattr(sparse_lib, "CHUNK_ELEMENTS", chunk_rows * D)
        table, state = TABLE, optimizer.init(TABLE)
        for step in range(3):
            ids = jnp.array([3, 7, 3, V - 1, 0, 5, 5, 9, 1, 2, 30, -1]) % (V + 1)
            grads = jnp.sin(jnp.arange(N * D).reshape(N, D) + step)
            table, state = sparse(optimizer, table, state, ids, grads)
        results.append((table, state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *results)
    assert results[1][1][0].count == 3 and not np.allclose(results[1][0], TABLE)


def test_lazy_adam_is_adam_for_rows_touched_at_every_step_and_rests_others():
    optimizer = optax.adam(0.1)
    results = {}
    for step in (dense, sparse):
        table, state = TABLE, optimizer.init(TABLE)
        for i in range(5):
            grads = jnp.sin(jnp.arange(N * D).reshape(N, D) + i)
            table, state = step(optimizer, table, state, jnp.arange(N) // 2, grads)
        results[step] = np.asarray(table)
    np.testing.assert_allclose(results[sparse], results[dense], rtol=1e-5, atol=1e-6)

    table, state = TABLE, optimizer.init(TABLE)
    table, state = sparse(optimizer, table, state, jnp.array([3]), jnp.ones((1, D)))
    after, _ = sparse(optimizer, table, state, jnp.array([4]), jnp.ones((1, D)))
    np.testing.assert_array_equal(after[3], table[3])
    lasting, _ = dense(optimizer, table, state, jnp.array([4]), jnp.ones((1, D)))
    assert not np.allclose(lasting[3], table[3])


def test_rowwise_adagrad_by_hand():
    optimizer = scale_by_rowwise_rss(eps=0.0)
    grads = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    updates, state = optimizer.update(grads, optimizer.init(jnp.zeros((2, 2))))
    np.testing.assert_allclose(state.sum_V, [12.5, 0.5])
    np.testing.assert_allclose(updates, grads / np.sqrt([[12.5], [0.5]]), rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), catch_up_adam(optax.constant_schedule(0.1))])
def test_the_table_is_changed_in_place_and_nothing_of_its_size_is_made(optimizer):
    rows, dim = 100_000, 16
    table = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    state = jax.eval_shape(optimizer.init, table)
    args = (jax.ShapeDtypeStruct((N,), jnp.int32), jax.ShapeDtypeStruct((N, dim), jnp.float32))

    def step(table, state, ids, grads):
        distinct = dedupe(ids, rows)
        entries_UD = gather_entries(table, distinct.rows_U)
        grads_UD = jnp.zeros_like(entries_UD).at[distinct.local_ids_N].add(grads)
        return update_rows(optimizer, table, state, distinct.rows_U, grads_UD)

    memory = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, *args).compile().memory_analysis()
    table_bytes = rows * dim * 4
    assert memory.alias_size_in_bytes >= 3 * table_bytes
    assert memory.temp_size_in_bytes < table_bytes / 100


def test_adam_with_catch_up_follows_dense_adam():
    """One row is touched at every tenth step only; momentum moves it in between."""
    rate = optax.constant_schedule(0.01)
    ours, exact, lazy = catch_up_adam(rate, b2=0.98), optax.adam(0.01, b2=0.98), optax.adam(0.01, b2=0.98)
    tables = {name: TABLE for name in ("ours", "exact", "lazy")}
    states = {"ours": ours.init(TABLE), "exact": exact.init(TABLE), "lazy": lazy.init(TABLE)}
    updates = {"ours": (sparse, ours), "exact": (dense, exact), "lazy": (sparse, lazy)}
    updates = {name: jax.jit(functools.partial(*pair)) for name, pair in updates.items()}
    for step in range(101):
        row = 3 if step % 10 == 0 else 4 + step % 10
        batch = jnp.array([row]), jnp.asarray(RNG.normal(size=(1, D)) + 1, jnp.float32)
        for name, update in updates.items():
            tables[name], states[name] = update(tables[name], states[name], *batch)
    seen = read_entries(ours, tables["ours"], states["ours"], jnp.arange(V))
    moved = np.asarray(tables["exact"] - TABLE)
    off, off_lazy = np.asarray(seen - tables["exact"]), np.asarray(tables["lazy"] - tables["exact"])
    distinct = slice(3, 14)
    assert np.abs(off[distinct]).max() < 0.02 * np.abs(moved[distinct]).max()
    assert np.abs(off[distinct]).max() < 0.05 * np.abs(off_lazy[distinct]).max()
    untouched = np.r_[0:3, 14:V]
    np.testing.assert_array_equal(np.asarray(seen)[untouched], TABLE[untouched])
    # Once caught up, nothing is missed, and the next update goes on from there alike.
    missed, caught = ours.missed(states["ours"])
    again, _ = ours.missed(caught)
    assert not np.asarray(again).any()
    batch = jnp.array([3]), jnp.ones((1, D))
    one, state_one = sparse(ours, tables["ours"], states["ours"], *batch)
    two, state_two = sparse(ours, tables["ours"] + missed, caught, *batch)
    np.testing.assert_allclose(one[3], two[3], rtol=1e-6)
    np.testing.assert_allclose(state_one.mu_VD[3], state_two.mu_VD[3], rtol=1e-6)


def test_momentum_that_never_fades_is_refused():
    with pytest.raises(ValueError, match="b1=0.99"):
        catch_up_adam(optax.constant_schedule(0.1), b1=0.99, b2=0.9)


def test_weight_decay_decays_the_touched_rows():
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.scale(-1.0))
    table, _ = sparse(optimizer, TABLE, optimizer.init(TABLE), jnp.array([2, 2]), jnp.zeros((2, D)))
    np.testing.assert_allclose(table[2], TABLE[2] / 2, rtol=1e-6)
    np.testing.assert_array_equal(np.delete(table, 2, axis=0), np.delete(TABLE, 2, axis=0))
