"""Row-sharded tables against plain indexing and dense updates, on every mesh and for adversarial ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.tables.exchange import AXES, Placement, dedupe_physical, read_sharded, update_sharded
from rec_jax.tables.layouts import shardings

NUM_ROWS, D, N, STEPS = 3000, 4, 64, 3  # N: ids of the whole batch
MESHES = [(1, 1), (8, 1), (2, 4), (1, 8)]  # data, model
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(NUM_ROWS, D)).astype(np.float32)
GRADS = RNG.normal(size=(N, D)).astype(np.float32)
OPTIMIZER = optax.adagrad(optax.linear_schedule(0.5, 0.1, 4))
PLACEMENT = Placement(NUM_ROWS)

IDS = {
    "uniform": RNG.integers(0, NUM_ROWS, N),
    "zipf": np.minimum(RNG.zipf(1.2, N), NUM_ROWS - 1),
    "all the same": np.full(N, 17),
    "all distinct": RNG.permutation(NUM_ROWS)[:N],
    "one shard": np.arange(N) % 3 * 1024,  # rows of one group
    "neighbours on one shard": RNG.permutation(N // 2)[np.arange(N) % (N // 2)] % 2 * 1024,
    "first and last": np.arange(N) % 2 * (NUM_ROWS - 1),
}


@functools.cache
def compiled_on(data, model, capacity):
    """Returns (array, state, step): step(array, state, ids, grads) -> (array, state, entries, rounds)."""
    mesh = make_mesh(MeshConfig(data=data, model=model))
    array = jax.device_put(PLACEMENT.place(TABLE), shardings(mesh, P(AXES)))
    state = OPTIMIZER.init(array)
    state_specs = jax.tree.map(lambda x: P(AXES) if x.ndim else P(), state)
    in_specs = (P(AXES), state_specs, P("data"), P("data"))
    out_specs = (P(AXES), state_specs, P("data"), P())

    def step(table_vD, state, ids_N, grads_ND):
        distinct = dedupe_physical(PLACEMENT, ids_N)
        entries_UD, rounds = read_sharded(OPTIMIZER, table_vD, state, distinct.entry_ids_U, capacity)
        grads_UD = jnp.zeros_like(entries_UD).at[distinct.local_ids_N].add(grads_ND)
        table_vD, state, _ = update_sharded(
            OPTIMIZER, table_vD, state, distinct.entry_ids_U, grads_UD, capacity
        )
        return table_vD, state, entries_UD[distinct.local_ids_N], rounds

    mapped = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    state = jax.device_put(state, shardings(mesh, state_specs))
    return array, state, jax.jit(mapped, out_shardings=shardings(mesh, out_specs))


def run(data, model, ids, capacity=4, steps=1):
    """Returns (entries of the ids in the first step, final table in the order of ids, rounds of a step)."""
    array, state, step = compiled_on(data, model, capacity)
    reads = []
    for _ in range(steps):
        array, state, entries, rounds = step(array, state, np.asarray(ids, np.int32), GRADS)
        reads.append(np.asarray(entries))
    assert step._cache_size() == 1
    return reads[0], np.asarray(PLACEMENT.unplace(array)), int(rounds)


@functools.cache
def dense_table(name):
    table, state = jnp.asarray(TABLE), OPTIMIZER.init(jnp.asarray(TABLE))
    grads_VD = np.zeros_like(TABLE)
    np.add.at(grads_VD, IDS[name], GRADS)
    for _ in range(STEPS):
        updates, state = OPTIMIZER.update(grads_VD, state, table)
        table = optax.apply_updates(table, updates)
    return np.asarray(table)


def test_placement_distributes_neighbours_and_is_inverted_by_unplace():
    array = np.asarray(PLACEMENT.place(TABLE))
    np.testing.assert_array_equal(PLACEMENT.unplace(array), TABLE)
    physical = PLACEMENT.to_physical(np.arange(NUM_ROWS))
    np.testing.assert_array_equal(array[physical], TABLE)
    per_shard = np.bincount(physical[:800] // (PLACEMENT.size // 8), minlength=8)
    assert per_shard.max() <= 128  # of the 800 most popular items
    assert PLACEMENT.to_physical(np.array([-1, NUM_ROWS])).tolist() == [-1, -1]


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("data, model", MESHES)
def test_reads_and_updates_equal_plain_indexing_and_dense_gradients(data, model, name):
    entries, table, _ = run(data, model, IDS[name], steps=STEPS)
    np.testing.assert_array_equal(entries, TABLE[IDS[name]])
    np.testing.assert_allclose(table, dense_table(name), rtol=1e-5, atol=1e-6)
    unread = np.setdiff1d(np.arange(NUM_ROWS), IDS[name])
    np.testing.assert_array_equal(table[unread], TABLE[unread])


def test_ids_that_exceed_the_capacity_are_sent_in_further_rounds():
    assert run(8, 1, IDS["all the same"], capacity=1)[2] == 1  # one distinct id on each device
    # Each device has the same three rows of one owner.
    assert [run(8, 1, IDS["one shard"], capacity)[2] for capacity in (1, 2, 4)] == [3, 2, 1]


@pytest.mark.parametrize("data, model", MESHES)
def test_invalid_ids_read_as_nan_and_are_never_written(data, model):
    ids = IDS["uniform"].copy()
    ids[[5, 20, 40]] = invalid = [-1, NUM_ROWS, 2**31 - 1]
    is_invalid = np.isin(ids, invalid)
    entries, table, _ = run(data, model, ids)
    assert np.isnan(entries[is_invalid]).all()
    np.testing.assert_array_equal(entries[~is_invalid], TABLE[ids[~is_invalid]])
    changed = np.flatnonzero((table != TABLE).any(-1))
    np.testing.assert_array_equal(changed, np.unique(ids[~is_invalid]))
