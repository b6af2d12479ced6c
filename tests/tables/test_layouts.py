"""Every layout of a table against plain indexing and dense updates of the whole table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.tables.layouts import DimSharded, Replicated, RowSharded, shardings

NUM_ROWS, D, N, STEPS = 3000, 8, 64, 3  # N: ids of the whole batch
SIZE = 3072  # rows of a spread table: whole groups of 1,024
MESHES = [(2, 4), (4, 1)]  # data, model
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(NUM_ROWS, D)).astype(np.float32)
OPTIMIZER = optax.adagrad(optax.linear_schedule(0.5, 0.1, 4))
LAYOUTS = {
    "replicated": Replicated,
    "dims": DimSharded,
    "rows": functools.partial(RowSharded, capacity_factor=0.05),  # takes many rounds
}
each_layout = pytest.mark.parametrize("name", LAYOUTS)
each_mesh = pytest.mark.parametrize("data, model", MESHES)


@functools.cache
def compiled_on(name, data, model):
    """(layout, arrays, state, step(arrays, state, ids_N, grads_ND)). grads_ND: of what was looked up."""
    mesh = make_mesh(MeshConfig(data=data, model=model))
    layout = LAYOUTS[name](NUM_ROWS, mesh)
    arrays = layout.place(jnp.asarray(TABLE))
    state = layout.init(OPTIMIZER, arrays)

    def step(arrays, state, ids_N, grads_ND):
        read = layout.read(OPTIMIZER, arrays, state, jnp.concatenate([jnp.zeros(1, jnp.int32), ids_N]))
        local_ids_N = read.local_ids_N[1:]
        grads_UD = jnp.zeros_like(read.entries_UD).at[local_ids_N].add(grads_ND)
        entry_ids, grads = layout.sum_grads(read.entry_ids, grads_UD)
        squares = layout.sum_squares(entry_ids, grads)
        arrays, state, again = layout.update(OPTIMIZER, arrays, state, entry_ids, grads)
        return arrays, state, (read.entries_UD[local_ids_N], read.local_ids_N[:1], squares, again, read.rounds)

    specs = (layout.spec, layout.state_specs(state))
    in_specs, out_specs = (*specs, P("data"), P("data")), (*specs, (P("data"), P("data"), P(), P(), P()))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return layout, arrays, state, jax.jit(mapped, out_shardings=shardings(mesh, out_specs))


def batches():
    """Frequent ids and rare ones, a quarter of them padding; the last batch is all padding."""
    rng = np.random.default_rng(1)
    for index in range(STEPS):
        ids = np.minimum(rng.zipf(1.3, N), NUM_ROWS - 1) * (rng.random(N) < 0.75)
        ids[:2], ids[-2:] = [1, 2999], [2999, 7]  # hot ones on several devices
        grads = rng.normal(size=(N, D)).astype(np.float32)
        yield (ids if index < STEPS - 1 else 0 * ids).astype(np.int32), grads


@each_mesh
@each_layout
def test_reads_and_updates_are_those_of_a_plain_table(name, data, model):
    layout, arrays, state, step = compiled_on(name, data, model)
    table, dense_state = jnp.asarray(TABLE), OPTIMIZER.init(jnp.asarray(TABLE))
    for ids, grads in batches():
        arrays, state, (looked_up, padding, *squares, rounds) = step(arrays, state, ids, grads)
        np.testing.assert_allclose(looked_up, table[ids], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(padding, 0)
        dense = jnp.zeros_like(table).at[ids].add(grads)
        np.testing.assert_allclose(squares, jnp.sum(dense**2), rtol=1e-5)
        updates, dense_state = OPTIMIZER.update(dense, dense_state, table)
        table = optax.apply_updates(table, updates)
        assert (rounds > 1) == (name == "rows" and ids.any())
    assert step._cache_size() == 1
    np.testing.assert_allclose(layout.unplace(arrays), table, rtol=1e-5, atol=1e-6)
    untouched = np.setdiff1d(np.arange(NUM_ROWS), np.concatenate([ids for ids, _ in batches()]))
    np.testing.assert_array_equal(layout.unplace(arrays)[untouched], TABLE[untouched])


@each_mesh
@each_layout
def test_a_table_comes_back_as_it_was_placed(name, data, model):
    layout, arrays, _, step = compiled_on(name, data, model)
    np.testing.assert_array_equal(layout.unplace(arrays), TABLE)


@each_mesh
@each_layout
def test_an_id_that_is_no_row_reads_as_nan_and_is_never_written(name, data, model):
    layout, arrays, state, step = compiled_on(name, data, model)
    ids, _ = next(batches())
    ids[[3, 20, 40, 60]] = [-1, NUM_ROWS, SIZE, 2**31 - 1]
    is_bad = (ids < 0) | (ids >= NUM_ROWS)
    arrays, _, (looked_up, *_) = step(arrays, state, ids, np.ones((N, D), np.float32))
    assert np.isnan(looked_up[is_bad]).all()
    np.testing.assert_array_equal(looked_up[~is_bad], TABLE[ids[~is_bad]])
    changed = np.flatnonzero((layout.unplace(arrays) != TABLE).any(-1))
    np.testing.assert_array_equal(changed, np.unique(ids[~is_bad]))


@each_mesh
@each_layout
def test_a_device_holds_what_the_layout_says(name, data, model):
    _, arrays, state, _ = compiled_on(name, data, model)
    devices = data * model
    expected = {
        "replicated": NUM_ROWS * D,
        "dims": NUM_ROWS * D // model,
        "rows": SIZE * D // devices,
    }[name]

    def elements(tree):  # of each device, counts of steps left out
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim]
        return [sum(x.addressable_shards[i].data.size for x in leaves) for i in range(devices)]

    assert elements(arrays) == elements(state) == [expected] * devices
