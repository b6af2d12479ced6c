"""Several tables in one step, against plain optax with dense gradients of the whole tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from experiments.speed.collectives import collective_bytes
from rec_jax.hashing import mix
from rec_jax.mesh import MeshConfig, make_mesh, replicate
from rec_jax.tables.layouts import DimSharded, Replicated, RowSharded, shardings
from rec_jax.tables.sparse import scale_by_rowwise_rss
from rec_jax.tables.tables import Table, Tables

B, S, K, STEPS = 16, 5, 6, 3
NUM_ITEMS, NUM_CITIES = 2999, 99
MESHES = [(1, 1), (2, 4)]  # data, model
NUM_TAG_IDS = 15  # of a history
KEYS = jax.random.split(jax.random.key(0), 5)
WHOLE = {
    "items": 0.3 * jax.random.normal(KEYS[0], (1 + NUM_ITEMS, 16)),
    "tags": 0.3 * jax.random.normal(KEYS[1], (40, 4)),
    "users": 0.02 * jax.random.normal(KEYS[3], (64, 8)),  # several hashed users share an entry
    "cities": 0.5 * jax.random.normal(KEYS[4], (1 + NUM_CITIES, 2)),
}
PARAMS = np.asarray(0.3 * jax.random.normal(KEYS[2], (16 + 4 + 4 + 8 + 2, 16)))  # NumPy is never donated
DECAY = 0.5
OPTIMIZERS = {
    "items": optax.chain(
        scale_by_rowwise_rss(), optax.scale_by_learning_rate(optax.linear_schedule(0.3, 0.1, 4))
    ),
    "tags": optax.adagrad(0.3),
    "users": optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(0.3)),
    "cities": optax.adagrad(0.3),
}


def tables_on(mesh, whole=WHOLE):
    num_rows = {name: len(table_VD) for name, table_VD in whole.items()}
    layouts = {
        "items": RowSharded(num_rows["items"], mesh),
        "tags": Replicated(num_rows["tags"], mesh),
        "users": DimSharded(num_rows["users"], mesh),
        "cities": RowSharded(num_rows["cities"], mesh, capacity_factor=0.5),
    }
    return Tables({name: Table(name, layout, OPTIMIZERS[name]) for name, layout in layouts.items()})


def make_batch(seed):
    """Histories of different lengths, whose events have several tags; with seed 1, no event has a tag."""
    rng = np.random.default_rng(seed)
    walk = np.minimum(rng.zipf(1.2, (B, S + 1)), NUM_ITEMS)
    is_real = np.arange(S) < rng.integers(1, S + 1, B)[:, None]
    most_tags = 0 if seed == 1 else 3
    tags, bags = np.zeros((B, NUM_TAG_IDS), np.int32), np.full((B, NUM_TAG_IDS), S, np.int32)
    for row in range(B):
        counts = rng.integers(0, most_tags + 1, S)
        tags[row, : counts.sum()] = rng.integers(1, 40, counts.sum())
        bags[row, : counts.sum()] = np.repeat(np.arange(S), counts)
    return {
        "items": np.where(is_real, walk[:, :-1], 0).astype(np.int32),
        "targets": np.where(is_real, walk[:, 1:], 0).astype(np.int32),
        "negatives": rng.integers(1, NUM_ITEMS + 1, (B, K), np.int32),
        "tags": tags,
        "bags": bags,
        "weights": rng.random((B, NUM_TAG_IDS), np.float32),
        "users": rng.integers(1, 2**31 - 1, B, np.int32),
        "cities": rng.integers(1, NUM_CITIES + 1, B, np.int32),
    }


def ids_of(batch):
    return {
        "items": {name: batch[name] for name in ("items", "targets", "negatives")},
        "tags": batch["tags"],
        "users": user_ids(batch["users"]),
        "cities": batch["cities"],
    }


def user_ids(users):
    """int32[..., 2]: the vector of a user is the sum of two entries, each chosen by a different hash."""
    return jnp.stack([1 + (mix(users, seed) % 63).astype(jnp.int32) for seed in (1, 2)], -1)


def bag(entries_ND, bag_N, weights_N):
    """f32[S, D]: for each event, the weighted sum of its entries."""
    return jax.ops.segment_sum(entries_ND * weights_N[:, None], bag_N, S)


def loss_sum(params, entries, local_ids, batch):
    """Returns (sum of the losses, number of targets). The dense reference passes whole tables and plain
    ids."""
    items = {name: entries["items"][ids] for name, ids in local_ids["items"].items()}
    tags_BND = entries["tags"][local_ids["tags"]]
    num_BS1 = jax.vmap(lambda bags: jnp.bincount(bags, length=S))(batch["bags"])[..., None]
    sum_BSD = jax.vmap(bag)(tags_BND, batch["bags"], jnp.ones_like(batch["weights"]))
    mean_BSD = sum_BSD / jnp.maximum(num_BS1, 1)
    weighted_BSD = jax.vmap(bag)(tags_BND, batch["bags"], batch["weights"])
    context_BD = jnp.concatenate(
        [entries["users"][local_ids["users"]].sum(-2), entries["cities"][local_ids["cities"]]], -1
    )
    context_BSD = jnp.repeat(context_BD[:, None], S, axis=1)
    x_BSD = jnp.concatenate([items["items"], mean_BSD, weighted_BSD, context_BSD], -1)
    x_BSD = jnp.tanh(jnp.cumsum(x_BSD, axis=1) @ params)
    target_BS = jnp.sum(x_BSD * items["targets"], -1)
    negative_BSK = jnp.einsum("bsd,bkd->bsk", x_BSD, items["negatives"])
    scores = jnp.concatenate([target_BS[..., None], negative_BSK], -1)
    is_target = batch["targets"] > 0
    losses = jnp.where(is_target, jax.nn.logsumexp(scores, -1) - target_BS, 0)
    return jnp.sum(losses), jnp.sum(is_target)


value_and_grad = jax.value_and_grad(loss_sum, argnums=(0, 1), has_aux=True)


def make_step(tables, states, mesh, compiler_options=None):
    """Returns step(state, batch, max_norm) -> (state, (loss, norm, squared norm of clipped table gradients)).

    state: (params, arrays, states).
    """

    def step(state, batch, max_norm):
        params, arrays, states = state
        reads = tables.read(arrays, states, ids_of(batch))
        sums, grads = value_and_grad(params, reads.entries, reads.local_ids, batch)
        (loss, num_targets), param_grads = jax.lax.psum((sums, grads[0]), "data")
        reads, table_grads = tables.sum_grads(reads, grads[1], {})
        grads = jax.tree.map(lambda g: g / num_targets, (param_grads, table_grads))
        norm = jnp.sqrt(jnp.sum(grads[0] ** 2) + tables.sum_squares(reads, grads[1]))
        grads = jax.tree.map(lambda g: g * jnp.minimum(1, max_norm / norm), grads)
        arrays, states, squares = tables.update(arrays, states, reads, grads[1])
        return (params - 0.3 * grads[0], arrays, states), (loss / num_targets, norm, squares)

    state_specs = (P(), tables.specs, tables.state_specs(states))
    in_specs, out_specs = (state_specs, P("data"), P()), (state_specs, P())
    mapped = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    out_shardings = shardings(mesh, out_specs)
    return jax.jit(mapped, donate_argnums=0, out_shardings=out_shardings, compiler_options=compiler_options)


@jax.jit
def dense_step(state, batch, max_norm):
    params, whole, states = state
    (loss, num_targets), grads = value_and_grad(params, whole, ids_of(batch), batch)
    grads = jax.tree.map(lambda g: g / num_targets, grads)
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(lambda g: g * jnp.minimum(1, max_norm / norm), grads)
    updates = {}
    for name, optimizer in OPTIMIZERS.items():
        updates[name], states[name] = optimizer.update(grads[1][name], states[name], whole[name])
    # Weight decay applies only to the entries read, among which entry 0 (padding) always is.
    is_read_V = jnp.zeros(64, bool).at[user_ids(batch["users"])].set(True).at[0].set(True)
    updates["users"] = jnp.where(is_read_V[:, None], updates["users"], 0)
    state = (params - 0.3 * grads[0], optax.apply_updates(whole, updates), states)
    return state, (loss / num_targets, norm, optax.tree.norm(grads[1], squared=True))


@functools.cache
def compiled_on(data, model):
    mesh = make_mesh(MeshConfig(data=data, model=model))
    tables = tables_on(mesh)
    states = tables.init(tables.place(WHOLE))
    faster_to_compile = {"xla_backend_optimization_level": 0}
    return tables, make_step(tables, states, mesh, faster_to_compile)


def run(data, model, max_norm=jnp.inf, batches=(0, 1, 2)):
    """Returns ((params, tables in the order of ids) after all steps, metrics of each step)."""
    tables, step = compiled_on(data, model)
    arrays = tables.place(WHOLE)
    state = (replicate(PARAMS, make_mesh(MeshConfig(data=data, model=model))), arrays, tables.init(arrays))
    metrics = []
    for batch in batches:
        batch = make_batch(batch) if isinstance(batch, int) else batch
        state, out = step(state, batch, max_norm)
        metrics.append([float(x) for x in out])
    assert step._cache_size() == 1
    return (state[0], tables.unplace(state[1])), metrics


@functools.cache
def run_dense(max_norm=jnp.inf):
    state = (PARAMS, WHOLE, {name: OPTIMIZERS[name].init(table_VD) for name, table_VD in WHOLE.items()})
    metrics = []
    for seed in range(STEPS):
        state, out = dense_step(state, make_batch(seed), max_norm)
        metrics.append([float(x) for x in out])
    return state[:2], metrics


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("data, model", MESHES)
def test_tables_of_all_layouts_learn_the_same_as_with_dense_gradients(data, model):
    assert not make_batch(1)["tags"].any()  # a feature without ids
    trained = run(data, model)
    assert_close(trained, run_dense())
    users = trained[0][1]["users"]
    entry_ids = np.union1d(0, [user_ids(make_batch(seed)["users"]) for seed in range(STEPS)])
    unread = np.setdiff1d(np.arange(len(users)), entry_ids)
    assert 0 < len(unread) < len(users)
    np.testing.assert_array_equal(users[unread], WHOLE["users"][unread])  # no weight decay either


@pytest.mark.parametrize("data, model", MESHES)
def test_gradients_are_clipped_by_their_total_norm(data, model):
    limit = 0.1
    clipped = run(data, model, limit)
    assert min(norm for _, norm, _ in clipped[1]) > limit
    assert_close(clipped, run_dense(limit))


@pytest.mark.parametrize(
    "name, invalid",
    [
        ("items", -1),
        ("targets", NUM_ITEMS + 1),
        ("negatives", 2**30),
        ("tags", -1),
        ("cities", NUM_CITIES + 1),
    ],
)
def test_invalid_id_makes_the_loss_nan(name, invalid):
    batch = make_batch(0)
    batch["bags"][0, 0] = 0
    assert np.isfinite(run(2, 4, batches=[batch])[1]).all()
    batch[name].reshape(B, -1)[0, 0] = invalid
    assert np.isnan(run(2, 4, batches=[batch])[1][0][0])


def test_step_allocates_and_sends_nothing_of_the_size_of_a_table():
    mesh = make_mesh(MeshConfig(data=2, model=4))
    whole = {name: jax.ShapeDtypeStruct((2**21, x.shape[1]), x.dtype) for name, x in WHOLE.items()}
    tables = tables_on(mesh, whole)
    arrays = jax.eval_shape(tables.place, whole)
    states = jax.eval_shape(tables.init, arrays)
    arrays, states = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (arrays, states),
        shardings(mesh, (tables.specs, tables.state_specs(states))),
    )
    step = make_step(tables, states, mesh)
    compiled = step.lower((PARAMS, arrays, states), make_batch(0), jnp.inf).compile()

    def bytes_of(tree):  # per device
        return sum(
            np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    smallest = min(bytes_of(array) for array in arrays.values())
    assert smallest > 2**20
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * smallest
    assert memory.alias_size_in_bytes >= bytes_of((arrays, states))
    assert sum(collective_bytes(compiled.as_text(), mesh.size).values()) < 0.1 * smallest


def test_wrong_tables_and_ids_are_refused():
    mesh = make_mesh(MeshConfig(data=2))
    tables = tables_on(mesh)
    with pytest.raises(ValueError, match="39 rows: it must have num_rows=40"):
        tables.place(WHOLE | {"tags": WHOLE["tags"][1:]})
    with pytest.raises(ValueError, match=r"ids=\['item_tags', 'items'\] must name all tables"):
        tables.read({}, {}, {"items": jnp.zeros(1, jnp.int32), "item_tags": jnp.zeros(1, jnp.int32)})
    for ids in (jnp.zeros(1), {}):
        with pytest.raises(ValueError, match=r"ids\['items'\] must be at least one int32"):
            tables.read({}, {}, dict.fromkeys(WHOLE, ids))


def test_without_tables_methods_do_nothing():
    none, params = Tables({}), {"kernel": PARAMS}
    assert none.split(params) == (params, {}) and none.join(params, {}) == params and not none
    reads = none.read({}, {}, {})
    assert none.sum_grads(reads, {}, {}) == (reads, {}) and none.update({}, {}, reads, {}) == ({}, {}, 0)
    assert none.sum_squares(reads, {}) == 0 and none.placement is None and not none.can_catch_up
