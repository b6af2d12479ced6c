"""Tables and bags against NumPy and flax.nnx.Embed; hashes against what chance would give."""

import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_jax.tables import embedding
from rec_jax.tables.embedding import (
    Embedding,
    MultiHash,
    QuotientRemainder,
    bag,
    collision_statistics,
    hash_ids,
    hash_strings,
    ragged,
    reset_rows,
)
from rec_jax.tables.sparse import scale_by_rowwise_rss

V, D = 7, 3
NORMAL = nnx.initializers.normal(0.02)


def test_slices_are_independent_draws_of_the_same_distribution(monkeypatch):
    init = jax.nn.initializers.normal(0.5)
    whole = init(jax.random.key(0), (1000, 8), jnp.float32)
    np.testing.assert_array_equal(embedding.sliced(init)(jax.random.key(0), (1000, 8), jnp.float32), whole)
    monkeypatch.setattr(embedding, "_SLICE_ELEMENTS", 8 * 300)
    table = np.asarray(embedding.sliced(init)(jax.random.key(0), (1000, 8), jnp.float32))
    assert table.shape == (1000, 8) and len(np.unique(table[:, 0])) == 1000
    assert abs(table.mean()) < 4 * 0.5 / np.sqrt(8000) and abs(table.std() - 0.5) < 0.02


def test_the_bits_are_those_of_nnx_embed(monkeypatch):
    monkeypatch.setattr(embedding, "_SLICE_ELEMENTS", 80)  # four slices

    def ours(rngs):
        return Embedding(40, 8, rngs=rngs)

    def theirs(rngs):
        return nnx.Embed(40, 8, embedding_init=embedding.sliced(NORMAL), rngs=rngs)

    def drawn(build):
        return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(build(nnx.Rngs(params=key)))))(
            jax.random.key(3)
        )

    jax.tree.map(np.testing.assert_array_equal, drawn(ours), drawn(theirs))


def lookup(module, ids, weights=0.0):
    """Vectors, and the gradient of their sum under those weights with respect to the table."""
    graphdef, state = nnx.split(module, nnx.Param)

    @functools.partial(jax.grad, has_aux=True)
    def loss(params, ids):
        vectors = nnx.merge(graphdef, nnx.State(params))(ids)
        return jnp.sum(vectors * weights), vectors

    grads, vectors = jax.jit(loss)(nnx.to_pure_dict(state), np.asarray(ids, np.int32))
    return np.asarray(vectors), np.asarray(grads["embedding"])


def test_lookup_and_gradient_are_those_of_nnx_embed():
    ids, weights = [[0, 6, 2], [2, 2, 5]], np.arange(18.0).reshape(2, 3, D)
    ours, theirs = Embedding(V, D, rngs=nnx.Rngs(0)), nnx.Embed(V, D, embedding_init=NORMAL, rngs=nnx.Rngs(0))
    for got, expected in zip(lookup(ours, ids, weights), lookup(theirs, ids, weights), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert lookup(ours, np.zeros((2, 0)))[0].shape == (2, 0, D)


@pytest.mark.parametrize("num_rows", [1, V])
def test_an_id_that_is_no_row_reads_as_nan_and_changes_no_row(num_rows):
    module = Embedding(num_rows, D, rngs=nnx.Rngs(0))
    vectors, grads = lookup(module, [-1, num_rows, -(2**31), 2**31 - 1, -num_rows, 0], weights=1.0)
    assert np.isnan(vectors[:-1]).all() and not np.isnan(vectors[-1]).any()
    np.testing.assert_array_equal(grads, np.eye(num_rows)[0][:, None] * np.ones(D))


# Compositional tables


@pytest.mark.parametrize("num_ids,num_remainders", [(1, 1), (10, 1), (10, 10), (10, 3), (999, 32)])
def test_distinct_ids_have_distinct_pairs_of_rows(num_ids, num_remainders):
    module = nnx.eval_shape(lambda: QuotientRemainder(num_ids, num_remainders, D, rngs=nnx.Rngs(0)))
    rows = np.asarray(jax.jit(module.rows)(np.arange(num_ids)))
    assert rows.dtype == np.int32 and len(np.unique(rows, axis=0)) == num_ids
    assert module.embedding.shape == (module.num_rows, D)
    np.testing.assert_array_equal(np.unique(rows), np.arange(module.num_rows))  # each row is of use


def test_quotient_remainder_by_hand():
    ids = np.array([0, 9, -1, 10, 11, 2**31 - 1, -(2**31)])
    for operation, combine in (("product", np.multiply), ("sum", np.add)):
        module = QuotientRemainder(10, 4, D, operation=operation, rngs=nnx.Rngs(0))
        table = np.asarray(module.embedding[...])  # 3 rows of quotients, 4 of remainders
        np.testing.assert_array_equal(jax.jit(module.rows)(ids), [[0, 3], [2, 4]] + [[7, 7]] * 5)
        vectors, _ = lookup(module, ids)
        np.testing.assert_array_equal(vectors[:2], combine(table[[0, 2]], table[[3, 4]]))
        assert np.isnan(vectors[2:]).all()


MODULES = {
    "product": lambda: QuotientRemainder(5000, 70, 16, rngs=nnx.Rngs(1)),
    "sum": lambda: QuotientRemainder(5000, 70, 16, operation="sum", rngs=nnx.Rngs(1)),
    "three hashes": lambda: MultiHash(5000, 16, k=3, rngs=nnx.Rngs(1)),
}


@functools.cache
def module_of(name):
    return MODULES[name]()


def test_a_sum_cannot_change_the_order_of_remainders_between_quotients_but_a_product_can():
    ids = [[0, 1], [70, 71]]  # [quotient, remainder]
    gaps = {}
    for operation in ("sum", "product"):
        vectors, _ = lookup(module_of(operation), ids)
        gaps[operation] = vectors[:, 0] - vectors[:, 1]
    np.testing.assert_allclose(gaps["sum"][0], gaps["sum"][1], atol=1e-7)
    assert not np.allclose(gaps["product"][0], gaps["product"][1], atol=1e-3)


@pytest.mark.parametrize("name", MODULES)
def test_vectors_start_as_those_of_a_plain_table_do(name):
    vectors, _ = lookup(module_of(name), np.arange(1, 5000))
    assert abs(vectors.mean()) < 0.001
    np.testing.assert_allclose(vectors.std(), 0.02, rtol=0.1)


@pytest.mark.parametrize("name", MODULES)
def test_rows_read_elsewhere_give_the_same_vectors_and_gradients(name):
    """What a trainer does that updates only touched rows."""
    module = module_of(name)
    ids, weights = np.array([[3, 4999], [71, 3]]), np.arange(64.0).reshape(2, 2, 16)
    rows, table = np.asarray(jax.jit(module.rows)(ids)), np.asarray(module.embedding[...])
    vectors, combine_vjp = jax.vjp(jax.jit(module.combine), table[rows])
    by_hand = np.zeros(table.shape)
    np.add.at(by_hand, rows, combine_vjp(jnp.asarray(weights, jnp.float32))[0])
    expected, grads = lookup(module, ids, weights)
    np.testing.assert_allclose(vectors, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(grads, by_hand, rtol=1e-5, atol=1e-6)


def test_multi_hash_takes_any_id():
    module = module_of("three hashes")
    ids = np.array([0, 1, -1, 2**31 - 1, -(2**31)])
    rows = np.asarray(jax.jit(module.rows)(ids))
    assert rows.shape == (5, 3) and rows.dtype == np.int32
    assert (rows[0] == 0).all() and (rows[1:] > 0).all() and (rows < 5000).all()
    table = np.asarray(module.embedding[...])
    np.testing.assert_allclose(lookup(module, ids)[0], table[rows].sum(1), rtol=1e-5, atol=1e-7)
    for seed in range(3):
        np.testing.assert_array_equal(rows[:, seed], hash_ids(ids, 5000, seed))


# Hashes


@pytest.mark.parametrize("num_rows", [2, 3, 1001, 1025])
@pytest.mark.parametrize("step", [1, 64, 1000])
def test_hashed_ids_collide_as_often_as_chance_has_it(num_rows, step):
    n, m = 20_000, num_rows - 1
    rows = [np.asarray(hash_ids(np.arange(1, n + 1) * step, num_rows, seed)) for seed in (0, 1, 2)]
    assert all(r.min() == 1 and r.max() == m for r in rows)
    chi = np.sum((np.bincount(rows[0] - 1) - n / m) ** 2) / (n / m)
    assert chi < m + 5 * np.sqrt(2 * m)
    # Collisions under two seeds are independent: this many pairs of ids share both rows.
    for other in rows[1:]:
        counts = np.bincount(rows[0] * num_rows + other)
        expected = n * (n - 1) / 2 / m**2
        assert abs(np.sum(counts * (counts - 1) / 2) - expected) < 5 * np.sqrt(expected * (1 + n / m))


def test_the_same_rows_on_the_host_under_jit_and_for_every_integer_type():
    ids = np.array([0, 1, 5, 70_000, 2**31 - 1])
    expected = np.asarray(hash_ids(jnp.asarray(ids, jnp.int32), 100, 4))
    for kind in (np.int32, np.uint32, np.int64, np.uint64):
        np.testing.assert_array_equal(hash_ids(ids.astype(kind), 100, 4), expected)
    np.testing.assert_array_equal(jax.jit(hash_ids, static_argnums=(1, 2))(ids, 100, 4), expected)
    np.testing.assert_array_equal(hash_ids(ids.tolist(), 100, 4), expected)
    assert hash_ids([], 100).shape == (0,)
    # Written down, for a trained table is worth nothing under another hash.
    np.testing.assert_array_equal(hash_ids(np.arange(5), 1_000_000), [0, 847706, 695413, 364382, 941330])
    rows = hash_strings(["", "a", "b", "ü", "a\0"], 1_000_000)
    np.testing.assert_array_equal(rows, [0, 508569, 905976, 155194, 238621])


def test_strings_spread_and_differ_by_seed():
    texts = [f"item {i}" for i in range(5000)]
    first, second = (hash_strings(texts, 5000, seed) for seed in (0, 1))
    assert first.dtype == np.int32 and first.min() >= 1 and first.max() < 5000
    assert np.mean(first == second) < 0.005
    stats = collision_statistics(first, 5000)
    np.testing.assert_allclose(stats["ids_in_collision"], stats["expected_ids_in_collision"], rtol=0.05)
    assert hash_strings([], 5000).shape == (0,)


def test_collisions_by_hand():
    stats = collision_statistics([0, 1, 1, 1, 2, 3, 3, 0], 5)
    assert stats == {
        "ids": 6, "rows_used": 3, "ids_in_collision": 5, "max_ids_per_row": 3,
        "expected_ids_in_collision": pytest.approx(6 * (1 - 0.75**5)),
    }  # fmt: skip
    for rows in ([], [0]):
        assert set(collision_statistics(rows, 2).values()) == {0}
    assert collision_statistics([1], 2)["expected_ids_in_collision"] == 0
    assert collision_statistics([1, 1], 2)["expected_ids_in_collision"] == 2


def test_a_bad_hash_shows():
    ids = np.arange(1, 20_001)
    good = collision_statistics(hash_ids(ids, 60_001), 60_001)
    bad = collision_statistics(1 + ids % 1000, 60_001)
    assert 0.9 < good["ids_in_collision"] / good["expected_ids_in_collision"] < 1.1
    assert bad["ids_in_collision"] > 3 * bad["expected_ids_in_collision"]


# Bags


def slow_bag(rows, bags, num_bags, weights, combine):
    out = np.zeros((num_bags, rows.shape[1]))
    for b in range(num_bags):
        inside = bags == b
        total = weights[inside].sum() if combine == "mean" else 1
        if total:
            out[b] = (rows[inside] * weights[inside, None]).sum(0) / total
    return out


jitted_bag = jax.jit(bag, static_argnames=("num_bags", "combine"))


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(-5, 9), max_size=6), max_size=6),
    st.sampled_from([0, 4]),
    st.sampled_from(["sum", "mean"]),
)
def test_ragged_lists_into_bags_against_a_loop(lists, room, combine):
    capacity = 36 + room
    ids, bags = ragged(lists, capacity)
    assert ids.dtype == bags.dtype == np.int32 and ids.shape == bags.shape == (capacity,)
    assert [ids[bags == b].tolist() for b in range(len(lists))] == lists
    num_bags = 7  # more than there are lists: what is left over stays out of them all
    assert (bags[sum(map(len, lists)) :] >= num_bags).all()
    rows = np.random.default_rng(0).normal(size=(capacity, D)).astype(np.float32)
    weights = np.arange(capacity, dtype=np.float32) % 3
    got = jitted_bag(rows, bags, num_bags, weights_N=weights, combine=combine)
    np.testing.assert_allclose(got, slow_bag(rows, bags, num_bags, weights, combine), rtol=1e-5, atol=1e-6)


def test_bags_by_hand():
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]])
    bags = np.array([0, 0, 2, 3])
    np.testing.assert_array_equal(jitted_bag(rows, bags, 3), [[4, 6], [0, 0], [5, 6]])
    np.testing.assert_array_equal(jitted_bag(rows, bags, 3, combine="mean"), [[2, 3], [0, 0], [5, 6]])
    weights = np.array([1.0, 3.0, 0.0, 1.0])
    np.testing.assert_array_equal(jitted_bag(rows, bags, 3, weights_N=weights), [[10, 14], [0, 0], [0, 0]])
    mean = jitted_bag(rows, bags, 3, weights_N=weights, combine="mean")
    np.testing.assert_array_equal(mean, [[2.5, 3.5], [0, 0], [0, 0]])


@pytest.mark.parametrize("combine,expected", [("sum", 1000), ("mean", 1)])
def test_long_bags_in_half_precision_are_summed_in_f32(combine, expected):
    rows, bags = np.ones((1000, 1), jnp.bfloat16), np.zeros(1000, np.int32)
    got = jitted_bag(rows, bags, 1, combine=combine)
    assert got.dtype == jnp.bfloat16 and np.asarray(got) == expected


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_gradients_of_bags_are_those_of_a_dense_product(combine):
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(6, 2)).astype(np.float32), rng.uniform(1, 2, 6).astype(np.float32)
    bags = jnp.array([0, 0, 0, 2, 2, 5])  # bag 1 is empty, the last vector in none

    def ours(rows, weights):
        return bag(rows, bags, 3, weights_N=weights, combine=combine)

    def dense(rows, weights):
        shares_BN = (bags == jnp.arange(3)[:, None]) * weights
        if combine == "mean":
            shares_BN /= shares_BN.sum(1, keepdims=True) + jnp.array([[0], [1], [0]])
        return shares_BN @ rows

    @jax.jit
    def grads(rows, weights):
        return [
            jax.grad(lambda *xs, f=f: jnp.sum(jnp.sin(f(*xs))), (0, 1))(rows, weights) for f in (ours, dense)
        ]

    got, expected = grads(rows, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
    assert (got[0][-1] == 0).all() and got[1][-1] == 0


# Resetting rows

OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "adagrad": optax.adagrad(0.1),
    "rowwise_adagrad": scale_by_rowwise_rss(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_rows_are_as_good_as_new_and_others_untouched(name):
    optimizer, key = OPTIMIZERS[name], jax.random.key(1)
    rows = np.array([5, 2, V, V + 9, -1])
    kept = np.array([0, 1, 3, 4, 6])

    @jax.jit
    def run(table):
        fresh = optimizer.init(table)
        state = fresh
        for _ in range(2):
            _, state = optimizer.update(jnp.ones_like(table), state, table)
        drawn = NORMAL(key, (5, D), jnp.float32)
        return (table, state), reset_rows(table, state, rows, key, NORMAL, optimizer), (drawn, fresh)

    old, new, (drawn, fresh) = jax.tree.map(np.asarray, run(np.arange(1.0, 1 + V * D).reshape(V, D)))
    np.testing.assert_allclose(new[0][rows[:2]], drawn[:2], rtol=1e-6)
    np.testing.assert_array_equal(new[0][kept], old[0][kept])

    def check(new, old, fresh):
        if not new.ndim:
            assert new == old  # a count of steps goes on
            return
        np.testing.assert_array_equal(new[kept], old[kept])
        np.testing.assert_array_equal(new[rows[:2]], fresh[rows[:2]])

    jax.tree.map(check, new[1], old[1], fresh)


def test_reset_without_an_optimizer_zeros_its_state():
    table, state = np.ones((V, D)), {"sums": np.ones((V, D)), "count": np.array(3), "v": np.ones(V)}
    reset = jax.jit(lambda *args: reset_rows(*args, jax.random.key(0), NORMAL))
    _, new = jax.tree.map(np.asarray, reset(table, state, np.array([1, V])))
    expected = (np.arange(V) != 1).astype(float)
    np.testing.assert_array_equal(new["sums"], expected[:, None] * np.ones(D))
    np.testing.assert_array_equal(new["v"], expected)
    assert new["count"] == 3
    for rows in (np.zeros(0, np.int32), np.array([V, -1])):
        np.testing.assert_array_equal(reset(table, state, rows)[0], table)


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: QuotientRemainder(10, 11, D, rngs=nnx.Rngs(0)), "num_remainders=11 .* num_ids=10"),
        (lambda: QuotientRemainder(10, 0, D, rngs=nnx.Rngs(0)), "num_remainders=0"),
        (lambda: QuotientRemainder(9, 3, D, operation="cat", rngs=nnx.Rngs(0)), "operation='cat'"),
        (lambda: MultiHash(9, D, k=0, rngs=nnx.Rngs(0)), "k=0"),
        (lambda: MultiHash(1, D, rngs=nnx.Rngs(0)), "num_rows=1"),
        (lambda: hash_ids(jnp.array([1]), 1), "num_rows=1"),
        (lambda: hash_ids(np.array([2**31]), 9), "2147483648 .* hash_strings"),
        (lambda: hash_ids(np.array([1.0]), 9), "float64"),
        (lambda: hash_strings(["a"], 1), "num_rows=1"),
        (lambda: collision_statistics([9], 9), "rows from 9 to 9"),
        (lambda: collision_statistics([-1], 9), "rows from -1"),
        (lambda: ragged([[1, 2], [3]], 2), "capacity=2 .* 3 ids of 2 lists"),
        (lambda: ragged([[2**31]], 2), "32 bits"),
        (lambda: ragged([[], [1.5]], 2), "integers"),
        (lambda: bag(jnp.ones((1, 1)), jnp.array([0]), 1, combine="max"), "combine='max'"),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(ValueError, match=match):
        make()
