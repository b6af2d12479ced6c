"""Sharded tables against plain indexing and dense updates, on every mesh and for adversarial ids."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.tables.exchange import AXES, Placement, dedupe_physical, read_sharded, update_sharded

NUM_ROWS, D, N = 3000, 4, 64  # ids of the whole batch
MESHES = [(1, 1), (8, 1), (2, 4), (1, 8)]  # data, model
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(NUM_ROWS, D)).astype(np.float32)
PLACEMENT = Placement(NUM_ROWS)

IDS = {
    "uniform": RNG.integers(0, NUM_ROWS, N),
    "zipf": np.minimum(RNG.zipf(1.2, N), NUM_ROWS - 1),
    "all the same": np.full(N, 17),
    "all distinct": RNG.permutation(NUM_ROWS)[:N],
    "one shard": np.arange(N) % 3 * 1024,  # rows of one group
    "neighbours on one shard": RNG.permutation(N // 2)[np.arange(N) % (N // 2)] % 2 * 1024,
    "first row and last": np.arange(N) % 2 * (NUM_ROWS - 1),
}


def mesh_of(data, model):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def run(mesh, ids, capacity, optimizer=None, grads=None, table=TABLE, steps=1):
    """Rows read for the ids, the table afterwards in the order of ids, and the number of rounds."""
    spec = P(AXES)
    array = jax.device_put(PLACEMENT.place(jnp.asarray(table)), NamedSharding(mesh, spec))
    optimizer = optimizer or optax.identity()
    grads = jnp.zeros((N, D)) if grads is None else jnp.asarray(grads)
    state = optimizer.init(array)
    state_spec = jax.tree.map(lambda x: spec if x.ndim else P(), state)
    state = jax.device_put(state, jax.tree.map(lambda s: NamedSharding(mesh, s), state_spec))

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec, state_spec, P("data"), P("data")),
        out_specs=(P("data"), spec, state_spec, P()),
        check_vma=False,
    )
    def step(table_vD, state, ids_N, grads_ND):
        distinct = dedupe_physical(PLACEMENT, ids_N)
        entries_UD, rounds = read_sharded(optimizer, table_vD, state, distinct.rows_U, capacity)
        grads_UD = jnp.zeros_like(entries_UD).at[distinct.local_ids_N].add(grads_ND)
        table_vD, state, _ = update_sharded(optimizer, table_vD, state, distinct.rows_U, grads_UD, capacity)
        return entries_UD[distinct.local_ids_N], table_vD, state, rounds

    for _ in range(steps):
        rows, array, state, rounds = step(array, state, jnp.asarray(ids), grads)
    return np.asarray(rows), np.asarray(PLACEMENT.unplace(array)), int(rounds)


def test_placement_spreads_neighbours_and_comes_back():
    np.testing.assert_array_equal(PLACEMENT.unplace(PLACEMENT.place(jnp.asarray(TABLE))), TABLE)
    physical = np.asarray(PLACEMENT.to_physical(jnp.arange(NUM_ROWS)))
    np.testing.assert_array_equal(PLACEMENT.place(jnp.asarray(TABLE))[physical], TABLE)
    per_shard = np.bincount(physical[:800] // (PLACEMENT.size // 8), minlength=8)
    assert per_shard.max() <= 128  # of the 800 most popular
    assert np.asarray(PLACEMENT.to_physical(jnp.array([-1, NUM_ROWS]))).tolist() == [-1, -1]


@pytest.mark.parametrize("name", ["zipf", "one shard", "first row and last"])
@pytest.mark.parametrize("data, model", MESHES)
def test_reads_are_plain_indexing(data, model, name):
    rows, table, _ = run(mesh_of(data, model), IDS[name], capacity=4)
    np.testing.assert_array_equal(rows, TABLE[IDS[name]])
    np.testing.assert_array_equal(table, TABLE)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("data, model", MESHES)
def test_updates_are_those_of_dense_gradients(data, model, name):
    optimizer = optax.adagrad(optax.linear_schedule(0.5, 0.1, 4))
    grads = RNG.normal(size=(N, D)).astype(np.float32)
    table, state = jnp.asarray(TABLE), optimizer.init(jnp.asarray(TABLE))
    dense = jnp.zeros_like(table).at[IDS[name]].add(grads)
    for _ in range(3):
        updates, state = optimizer.update(dense, state, table)
        table = optax.apply_updates(table, updates)
    _, updated, _ = run(mesh_of(data, model), IDS[name], 4, optimizer, grads, steps=3)
    np.testing.assert_allclose(updated, table, rtol=1e-5, atol=1e-6)


def test_what_exceeds_the_capacity_goes_in_further_rounds():
    mesh = mesh_of(8, 1)
    assert run(mesh, IDS["all the same"], capacity=1)[2] == 1  # one distinct id a device
    assert run(mesh, IDS["uniform"], capacity=N)[2] == 1
    # Each device has the same three rows of one owner: a round takes one of them.
    assert run(mesh, IDS["one shard"], capacity=1)[2] == 3
    assert run(mesh, IDS["one shard"], capacity=2)[2] == 2


@pytest.mark.parametrize("bad", [-1, NUM_ROWS, 2**31 - 1])
def test_an_id_that_is_no_row_reads_as_nan(bad):
    ids = IDS["uniform"].copy()
    ids[5] = bad
    for data, model in MESHES:
        rows, table, _ = run(mesh_of(data, model), ids, 4, optax.sgd(1.0), np.ones((N, D)))
        assert np.isnan(rows[5]).all() and not np.isnan(np.delete(rows, 5, axis=0)).any()
        assert np.isfinite(table).all()
