"""The lowest scores against NumPy's sort, and masks computed by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from jax.sharding import PartitionSpec as P
from prune_runs import KERNELS, ONCE, make_grads, make_params, one_step, train, with_kernel

from rec_jax.compress.lowest import find_leaves, kth_lowest, make_chooser, ordered_bits
from rec_jax.compress.prune import PruneConfig, prune, share_of_zeros
from rec_jax.mesh import MeshConfig, make_mesh

NORMAL_FLOATS = st.floats(width=32, allow_nan=False, allow_subnormal=False)


jitted_bits = jax.jit(ordered_bits)


@given(st_numpy.arrays(np.float32, 17, elements=NORMAL_FLOATS))
def test_bits_have_the_order_of_the_numbers(x):
    bits = np.asarray(jitted_bits(x))
    np.testing.assert_array_equal(bits[:, None] < bits, x[:, None] < x)
    np.testing.assert_array_equal(bits[:, None] == bits, x[:, None] == x)


@jax.jit
def lowest_of_two(x, y, num):
    """The key of the num-th lowest number, if each number of y counts three times."""
    return kth_lowest([(ordered_bits(x), 1, ()), (ordered_bits(y), 3, ())], num)


@given(
    st_numpy.arrays(np.float32, 9, elements=NORMAL_FLOATS),
    st_numpy.arrays(np.float32, 4, elements=st.sampled_from([-np.inf, -1.0, 0.0, 2.5])),
    st.integers(1, 9 + 3 * 4),
)
def test_the_kth_lowest_of_keys_that_stand_for_several_weights(x, y, num):
    expected = np.sort(np.concatenate([x, np.repeat(y, 3)]))[num - 1]
    assert int(lowest_of_two(x, y, num)) == int(jitted_bits(np.full(17, expected, np.float32))[0])


def test_the_bound_is_below_all_numbers_if_none_is_to_be_pruned():
    assert int(lowest_of_two(jnp.full(9, -jnp.inf), jnp.zeros(4), 0)) == 0
    assert int(ordered_bits(jnp.float32(-jnp.inf))) > 0


SHAPES = {"a": (8, 5), "b": (3, 20)}
SHARES = np.linspace(0, 0.99, 100)


@functools.cache
def chooser(score, scope):
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    leaves = find_leaves(params, {"a": True, "b": True})
    return jax.jit(make_chooser(PruneConfig(score=score, scope=scope), leaves, SHARES, 0))


@given(
    rounds=st.lists(st.integers(0, len(SHARES) - 1), min_size=1, max_size=3),
    score=st.sampled_from(["magnitude", "movement", "random"]),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(0, 10**6),
)
def test_the_requested_share_of_the_lowest_is_pruned(rounds, score, scope, seed):
    """In several rounds, each with other weights and scores."""
    rng = np.random.default_rng(seed)
    masks = {name: np.ones(shape, bool) for name, shape in SHAPES.items()}
    for index in sorted(rounds):
        before = masks
        params, scores = ({n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()} for _ in "ps")
        masks = chooser(score, scope)(index, params, before, scores)
        for names in ["ab"] if scope == "global" else ["a", "b"]:
            new, old, weights, given = (
                np.concatenate([np.asarray(tree[name]).ravel() for name in names])
                for tree in (masks, before, params, scores)
            )
            assert np.sum(~new) == round(SHARES[index] * new.size) and not (new & ~old).any()
            x = np.abs(weights) if score == "magnitude" else given
            if score != "random":
                assert x[old & ~new].max(initial=-np.inf) < x[new].min(initial=np.inf)


@pytest.mark.parametrize("data, model", [(8, 1), (2, 4)])
def test_every_device_gets_the_kth_lowest_of_all_devices(data, model):
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    replicated = np.arange(5, dtype=np.float32) / 10  # the same on all devices, to be counted once

    def find(x, replicated, num):
        units = [(ordered_bits(x), 1, ("data", "model")), (ordered_bits(replicated), 1, (None,))]
        return kth_lowest(units, num)[None, None]

    mesh, axes = make_mesh(MeshConfig(data=data, model=model)), P("data", "model")
    find = jax.jit(jax.shard_map(find, mesh=mesh, in_specs=(axes, P(), P()), out_specs=axes, check_vma=False))
    in_order = np.sort(np.concatenate([x.ravel(), replicated]))
    for num in (1, 40, 70, 133):
        bounds = np.asarray(find(x, replicated, num))
        np.testing.assert_array_equal(bounds, np.asarray(ordered_bits(in_order[num - 1])))


def test_magnitude_by_hand():
    params = with_kernel([[1.0, -4.0, 0.5], [-0.2, 2.0, 3.0]])
    pruned, _ = one_step(ONCE, params)
    np.testing.assert_array_equal(pruned["kernel"], [[0, -4, 0], [0, 2, 3]])


def test_taylor_by_hand():
    params = with_kernel([1.0, 2.0, 3.0, 4.0])
    config = dataclasses.replace(ONCE, score="taylor", end=0.2)  # of 10 steps
    grads = [jnp.array([5.0, 0.0, 1.0, 0.1]), jnp.array([0.0, -1.0, 0.2, 0.1])]
    optimizer = prune(optax.sgd(0.0), config, params, 10)
    pruned, state = train(optimizer, params, 2, lambda _, index: {"kernel": grads[index]})
    # 0.1 * (0.9 * [5, 0, 3, 0.4] + [0, 2, 0.6, 0.4])
    np.testing.assert_allclose(state.scores["kernel"], [0.45, 0.2, 0.33, 0.076], rtol=1e-5)
    np.testing.assert_array_equal(pruned["kernel"], [1, 0, 3, 0])


def test_movement_by_hand():
    """Weights that move towards 0 are pruned, even large ones."""
    params = with_kernel([10.0, -10.0, 0.1, -0.1])
    config = dataclasses.replace(ONCE, score="movement", end=0.2)
    grads = [jnp.array([1.0, 1.0, -1.0, -2.0]), jnp.array([2.0, 1.0, -1.0, 0.0])]
    optimizer = prune(optax.sgd(0.0), config, params, 10)
    pruned, state = train(optimizer, params, 2, lambda _, index: {"kernel": grads[index]})
    np.testing.assert_allclose(state.scores["kernel"], [-30, 20, 0.2, -0.2], rtol=1e-5)
    np.testing.assert_array_equal(pruned["kernel"], np.float32([0, -10, 0.1, 0]))


def test_random_scores_depend_on_the_seed_and_not_on_the_weights():
    params = with_kernel(np.arange(1, 4001))
    config = dataclasses.replace(ONCE, score="random", share=0.3)
    first, again, other = (
        np.asarray(
            train(prune(optax.sgd(0.0), config, params, 10, seed=seed), params, 1, make_grads)[0]["kernel"]
        )
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert 0.05 < np.mean((first == 0) & (other == 0)) < 0.13  # 0.09 expected
    assert 0.25 < np.mean(first[:2000] == 0) < 0.35
    assert np.sum(first == 0) == 1200


def test_scopes_compare_all_parameters_or_each_one():
    params = {"a": with_kernel([1.0, 2.0, 3.0, 4.0]), "b": with_kernel([10.0, 20.0, 30.0, 40.0])}
    by_all, _ = one_step(ONCE, params)
    np.testing.assert_array_equal(by_all["a"]["kernel"], [0, 0, 0, 0])
    np.testing.assert_array_equal(by_all["b"]["kernel"], params["b"]["kernel"])
    by_layer, _ = one_step(dataclasses.replace(ONCE, scope="layer"), params)
    np.testing.assert_array_equal(by_layer["a"]["kernel"], [0, 0, 3, 4])
    np.testing.assert_array_equal(by_layer["b"]["kernel"], [0, 0, 30, 40])


def test_whole_rows_and_columns_are_pruned():
    params = with_kernel([[3.0, 0.0, -4.0], [2.0, 2.0, -2.0], [-6.0, 0.1, 0.1], [0.1, -4.5, 0.1]])
    rows, _ = one_step(dataclasses.replace(ONCE, structure="rows"), params)  # sums of squares 25, 12, 36, 20
    np.testing.assert_array_equal(np.asarray(rows["kernel"]).any(1), [True, False, True, False])
    config = dataclasses.replace(ONCE, structure="columns", share=0.3)  # sums of squares 49, 24, 20
    columns, _ = one_step(config, params)
    np.testing.assert_array_equal((np.asarray(columns["kernel"]) == 0).all(0), [False, False, True])


def test_the_share_counts_weights_rather_than_rows():
    """5 of 10 weights are to be pruned; two rows of 2 weights have lower scores than the row of 4."""
    params = {
        "a": with_kernel(np.full((3, 2), [[1.0], [2.0], [9.0]])),
        "b": with_kernel(np.full((1, 4), 1.5)),
    }
    pruned, _ = one_step(
        dataclasses.replace(ONCE, structure="rows"), params
    )  # sums of squares 2, 8, 162 and 9
    np.testing.assert_array_equal(pruned["a"]["kernel"], [[0, 0], [0, 0], [9, 9]])
    np.testing.assert_array_equal(pruned["b"]["kernel"], np.zeros((1, 4)))  # one row more than the share


def two_of_four(x, num_pruned=2):
    """A NumPy reference: sets the lowest |x| of every 4 along dim 0 to 0; of equal ones, the first."""
    out = x.copy()
    for start in range(0, len(x), 4):
        for column in range(x.shape[1]):
            order = np.argsort(np.abs(x[start : start + 4, column]), kind="stable")
            out[start + order[:num_pruned], column] = 0
    return out


def test_two_of_four_are_pruned_along_the_contracted_dim():
    params = with_kernel([[1, 1], [-3, 1], [2, 1], [-4, 1], [5, 0], [6, 9], [-7, 8], [8, 7]])
    pruned, _ = one_step(dataclasses.replace(ONCE, structure="2:4"), params)
    expected = [[0, 0], [-3, 0], [0, 1], [-4, 1], [0, 0], [0, 9], [-7, 8], [8, 0]]
    np.testing.assert_array_equal(pruned["kernel"], expected)
    params = make_params()
    pruned, _ = one_step(dataclasses.replace(ONCE, structure="2:4"), params)
    np.testing.assert_array_equal(pruned["up"]["kernel"], two_of_four(np.asarray(params["up"]["kernel"])))
    assert share_of_zeros(pruned, KERNELS) == 0.5


def test_groups_of_four_lose_first_one_weight_then_two():
    params, counts = make_params(), []
    config = PruneConfig(names="up/kernel", share=0.5, structure="2:4", end=0.4, num_updates=4)
    optimizer = prune(optax.sgd(0.0), config, params, 10)  # shares 0.29, 0.44, 0.49, 0.5
    train(optimizer, params, 5, each=lambda params, _: counts.append(share_of_zeros(params, "up/kernel")))
    assert counts == [0.25, 0.25, 0.25, 0.5, 0.5]


def test_equal_scores_are_pruned_together():
    pruned, _ = one_step(ONCE, with_kernel([1.0, 2.0, 2.0, -2.0, 3.0, 4.0]))
    np.testing.assert_array_equal(pruned["kernel"], [0, 0, 0, 0, 3, 4])
