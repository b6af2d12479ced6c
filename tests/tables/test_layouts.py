"""All layouts of a table against plain indexing and dense updates of the whole table."""

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
SIZE = 3072  # rows of a row-sharded table: whole groups of 1,024
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
    """Returns (layout, arrays, state, step). step(arrays, state, ids_N, gradients of the lookup) -> (arrays,
    state, (looked up, local id of padding, squared gradients, the same from the update, rounds))."""
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
        arrays, state, update_squares = layout.update(OPTIMIZER, arrays, state, entry_ids, grads)
        looked_up, padding = read.entries_UD[local_ids_N], read.local_ids_N[:1]
        return arrays, state, (looked_up, padding, squares, update_squares, read.rounds)

    specs = (layout.spec, layout.state_specs(state))
    in_specs, out_specs = (*specs, P("data"), P("data")), (*specs, (P("data"), P("data"), P(), P(), P()))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return layout, arrays, state, jax.jit(mapped, out_shardings=shardings(mesh, out_specs))


def batches():
    """Frequent and rare ids; a quarter of them is padding. The last batch is only padding."""
    rng = np.random.default_rng(1)
    for index in range(STEPS):
        ids = np.minimum(rng.zipf(1.3, N), NUM_ROWS - 1) * (rng.random(N) < 0.75)
        ids[:2], ids[-2:] = [1, 2999], [2999, 7]  # the same ids on several devices
        grads = rng.normal(size=(N, D)).astype(np.float32)
        yield (ids if index < STEPS - 1 else 0 * ids).astype(np.int32), grads


@functools.cache
def dense_steps():
    """Returns [(table before the step, dense gradients, table after the step)] of a plain table."""
    table, state, steps = jnp.asarray(TABLE), OPTIMIZER.init(jnp.asarray(TABLE)), []
    for ids, grads in batches():
        dense = np.zeros_like(TABLE)
        np.add.at(dense, ids, grads)
        updates, state = OPTIMIZER.update(dense, state, table)
        before, table = table, optax.apply_updates(table, updates)
        steps.append(jax.device_get((before, dense, table)))
    return steps


@each_mesh
@each_layout
def test_reads_and_updates_equal_a_plain_table(name, data, model):
    layout, arrays, state, step = compiled_on(name, data, model)
    for (ids, grads), (table, dense, _) in zip(batches(), dense_steps(), strict=True):
        arrays, state, (looked_up, padding, *squares, rounds) = step(arrays, state, ids, grads)
        np.testing.assert_allclose(looked_up, table[ids], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(padding, 0)
        np.testing.assert_allclose(squares, np.sum(dense**2), rtol=1e-5)
        assert (rounds > 1) == (name == "rows" and ids.any())
    assert step._cache_size() == 1
    updated = np.asarray(layout.unplace(arrays))
    np.testing.assert_allclose(updated, dense_steps()[-1][2], rtol=1e-5, atol=1e-6)
    unread = np.setdiff1d(np.arange(NUM_ROWS), np.concatenate([ids for ids, _ in batches()]))
    np.testing.assert_array_equal(updated[unread], TABLE[unread])


@each_mesh
@each_layout
def test_unplace_inverts_place(name, data, model):
    layout, arrays, _, _ = compiled_on(name, data, model)
    np.testing.assert_array_equal(layout.unplace(arrays), TABLE)


@each_mesh
@each_layout
def test_invalid_ids_read_as_nan_and_are_never_written(name, data, model):
    layout, arrays, state, step = compiled_on(name, data, model)
    ids, _ = next(batches())
    ids[[3, 20, 40, 60]] = [-1, NUM_ROWS, SIZE, 2**31 - 1]
    is_invalid = (ids < 0) | (ids >= NUM_ROWS)
    arrays, _, (looked_up, *_) = step(arrays, state, ids, np.ones((N, D), np.float32))
    looked_up, updated = np.asarray(looked_up), np.asarray(layout.unplace(arrays))
    assert np.isnan(looked_up[is_invalid]).all()
    np.testing.assert_array_equal(looked_up[~is_invalid], TABLE[ids[~is_invalid]])
    changed = np.flatnonzero((updated != TABLE).any(-1))
    np.testing.assert_array_equal(changed, np.unique(ids[~is_invalid]))


@each_mesh
@each_layout
def test_each_device_holds_only_its_shard(name, data, model):
    _, arrays, state, _ = compiled_on(name, data, model)
    devices = data * model
    expected = {
        "replicated": NUM_ROWS * D,
        "dims": NUM_ROWS * D // model,
        "rows": SIZE * D // devices,
    }[name]

    def elements(tree):  # per device, without step counts
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim]
        return [sum(x.addressable_shards[i].data.size for x in leaves) for i in range(devices)]

    assert elements(arrays) == elements(state) == [expected] * devices
