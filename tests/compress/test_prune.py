"""Training with pruning masks: schedules, proximal steps, rewinding, meshes, and the optimizer's state."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from prune_runs import KERNELS, ONCE, make_grads, make_params, one_step, train, with_kernel

from rec_jax.compress.prune import (
    PruneConfig,
    hold_zeros,
    last_rewind,
    make_prune_schedule,
    prune,
    share_of_zeros,
)
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.nn import parallel
from rec_jax.tree import leaf_names

EPS = np.finfo(np.float32).eps


# The schedule


def shares_at(config, total_steps, steps):
    schedule = make_prune_schedule(config, total_steps)
    return [float(schedule(step)) for step in steps]


def test_schedules_by_hand():
    cubic = PruneConfig(share=0.8, schedule="cubic", begin=0.2, end=0.6, num_updates=2)
    np.testing.assert_allclose(
        shares_at(cubic, 10, [0, 3, 4, 5, 6, 10]), [0, 0, 0.7, 0.7, 0.8, 0.8], rtol=1e-6
    )
    once = dataclasses.replace(cubic, schedule="one_shot")
    np.testing.assert_allclose(shares_at(once, 10, [0, 5, 6, 10]), [0, 0, 0.8, 0.8], rtol=1e-6)
    rounds = dataclasses.replace(cubic, schedule="iterative", share=0.75)
    np.testing.assert_allclose(
        shares_at(rounds, 10, [0, 3, 4, 5, 6, 9]), [0, 0, 0.5, 0.5, 0.75, 0.75], rtol=1e-6
    )
    first_step = dataclasses.replace(once, begin=0.0, end=0.0)
    np.testing.assert_allclose(shares_at(first_step, 10, [0, 1]), [0, 0.8], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["one_shot", "cubic", "iterative"])
def test_training_follows_the_schedule_and_zeros_stay(schedule):
    """AdamW has momentum and weight decay, which move every weight that is not held at 0."""
    config = PruneConfig(
        names=KERNELS, share=0.7, schedule=schedule, score="taylor", begin=0.2, end=0.8, num_updates=3
    )
    params, total_steps = make_params(), 10
    optimizer = prune(optax.adamw(0.1, weight_decay=0.1), config, params, total_steps)
    schedule, history, size = make_prune_schedule(config, total_steps), [], 32 * 8 + 16 * 32

    def check(params, state):
        for name, mask in leaf_names(state.masks).items():
            is_zero = np.asarray(leaf_names(params)[name]) == 0
            np.testing.assert_array_equal(is_zero, ~np.asarray(mask))
            assert "kernel" in name or not is_zero.any()
            assert not history or not (history[-1][name] & ~is_zero).any()
        history.append({name: np.asarray(x) == 0 for name, x in leaf_names(params).items()})
        expected = round(float(schedule(int(state.count))) * size)
        assert sum(zeros.sum() for zeros in history[-1].values()) == expected

    params, _ = train(optimizer, params, total_steps, each=check)
    assert share_of_zeros(params, KERNELS) == round(0.7 * size) / size
    assert share_of_zeros(params, "items/table") == 0


# Proximal steps and rewinding


def test_proximal_steps_by_hand():
    params = with_kernel([3.0, -3.0, 0.2, -0.5])
    l1 = dataclasses.replace(ONCE, end=1.0, proximal="l1", proximal_strength=0.5)
    near, _ = one_step(l1, params, with_kernel([1.0, -1.0, 0.0, 0.1]), optax.sgd(1.0))
    np.testing.assert_allclose(near["kernel"], [1.5, -1.5, 0, -0.1], rtol=1e-5)
    assert near["kernel"][2] == 0
    l2 = dataclasses.replace(l1, proximal="l2")
    near, _ = one_step(l2, params, with_kernel([1.0, -1.0, 0.0, 0.1]), optax.sgd(1.0))
    np.testing.assert_allclose(near["kernel"], np.array([2, -2, 0.2, -0.6]) / 1.5, rtol=1e-5)


def test_proximal_steps_end_with_the_last_masks_and_skip_other_parameters():
    params = {"a": with_kernel([1.0, 2.0, 3.0, 4.0]), "bias": jnp.ones(3)}
    config = dataclasses.replace(ONCE, end=0.2, proximal="l1", proximal_strength=0.25)
    optimizer = prune(optax.sgd(0.0), config, params, 10)
    params, _ = train(optimizer, params, 4, lambda params, _: jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_array_equal(params["a"]["kernel"], [0, 0, 2.5, 3.5])
    np.testing.assert_array_equal(params["bias"], np.ones(3))


@pytest.mark.parametrize("begin", [0.0, 0.2])
def test_each_round_restarts_training_from_begin(begin):
    config = PruneConfig(
        names=KERNELS, share=0.75, schedule="iterative", begin=begin, end=begin + 0.4, num_updates=2
    )
    rates = optax.linear_schedule(0.1, 0.0, 10)
    start, inner = make_params(), optax.adam(rates)
    history = []
    optimizer = prune(inner, config, start, 10)
    train(optimizer, start, 8, each=lambda *both: history.append(jax.device_get(both)))
    counts = [int(state.inner[-1].count) for _, state in history]
    rewinds = [last_rewind(config, 10, done) for done in range(1, 9)]
    assert [done - rewind for done, rewind in zip(range(1, 9), rewinds, strict=True)] == counts
    first = round(10 * begin)  # the number of steps before `begin`
    origin = history[first - 1][0] if first else start
    for pruned_at, share in [(first + 2, 0.5), (first + 4, 0.75)]:
        params, state = history[pruned_at - 1]
        assert share_of_zeros(params, KERNELS) == share
        jax.tree.map(
            lambda p, o, m: np.testing.assert_allclose(p, np.where(m, o, 0), rtol=0, atol=EPS * 8),
            params, origin, state.masks,
        )  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, state.inner, inner.init(start))
        # The next step equals the first step of the inner optimizer, apart from the masks.
        updates, _ = inner.update(make_grads(params, pruned_at), inner.init(params), params)
        expected = jax.tree.map(lambda p, u, m: (p + u) * m, params, updates, state.masks)
        after = history[pruned_at][0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after, expected)
    assert not np.allclose(history[first][0]["items"]["table"], history[-1][0]["items"]["table"])
    assert last_rewind(dataclasses.replace(config, schedule="cubic"), 10, 9) == 0
    assert last_rewind(dataclasses.replace(config, names=""), 10, 9) == 0


# Meshes

CONFIGS = {
    "random": {"score": "random"},
    "rows": {"structure": "rows", "score": "movement"},
    "columns, layer": {"structure": "columns", "scope": "layer", "score": "taylor"},
    "2:4": {"structure": "2:4", "share": 0.5},
    "iterative": {"schedule": "iterative", "score": "magnitude"},
}
CHANNELS = {"up/kernel": (None, "ff_width"), "up/bias": ("ff_width",), "down/kernel": ("ff_width", None)}


def mesh_config(name):
    fields = {"share": 0.6, "end": 0.6, "num_updates": 2} | CONFIGS[name]
    return PruneConfig(names=".*(kernel|table)", **fields)


@functools.cache
def on_one_device(name):
    params = make_params()
    return jax.device_get(train(prune(optax.adam(0.1), mesh_config(name), params, 5), params, 5))


def on_mesh(optimizer, params, specs, mesh, steps):
    """Trains inside a shard_map, as the training step does."""
    state = jax.eval_shape(optimizer.init, params)
    state_specs = optax.tree.map_params(
        optimizer, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )

    def update(params, state, index):
        updates, state = optimizer.update(make_grads(params, index), state, params)
        return optax.apply_updates(params, updates), state

    both = (specs, state_specs)
    step = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(*both, P()), out_specs=both, check_vma=False))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), both)
    params, state = jax.device_put((params, optimizer.init(params)), shardings)
    for index in range(steps):
        params, state = step(params, state, index)
    return params, state


@pytest.mark.parametrize(
    "name, data, model",
    [*((name, 2, 4) for name in CONFIGS), ("rows", 8, 1), ("2:4", 8, 1)],
)
def test_masks_are_the_same_on_every_mesh(name, data, model):
    params = make_params()
    mesh = make_mesh(MeshConfig(data=data, model=model))
    dims = {}
    for path, units in CHANNELS.items():
        shape = leaf_names(params)[path].shape
        dims[path] = tuple((((unit, size),),) for unit, size in zip(units, shape, strict=True))
    specs = parallel.partition(params, dims, mesh, fully_sharded=True)
    assert specs["up"]["kernel"][1] == (specs["down"]["kernel"][0]) == ("model" if model > 1 else None)
    optimizer = prune(optax.adam(0.1), mesh_config(name), params, 5, specs)
    new_params, state = on_mesh(optimizer, params, specs, mesh, 5)
    expected, expected_state = on_one_device(name)
    jax.tree.map(np.testing.assert_array_equal, state.masks, expected_state.masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new_params, expected)
    assert share_of_zeros(new_params, ".*(kernel|table)") >= mesh_config(name).share - 0.001
    parts = {name: x.size // x.addressable_shards[0].data.size for name, x in leaf_names(state.masks).items()}
    assert parts["up/kernel"] == parts["down/kernel"] == 8 and parts["items/table"] == data


def test_shards_that_do_not_divide_into_groups_of_four_are_refused():
    params = {"a": with_kernel(np.ones((16, 4)))}
    config = dataclasses.replace(ONCE, structure="2:4")
    specs = {"a": {"kernel": P("data", None)}}
    optimizer = prune(optax.sgd(0.1), config, params, 10, specs)
    with pytest.raises(ValueError, match=r"a/kernel in groups of 4 along dim 0, but a device's shard has 2"):
        on_mesh(optimizer, params, specs, make_mesh(MeshConfig(data=8)), 1)


# The state, and training of pruned models


@pytest.mark.parametrize("schedule, score", [("cubic", "movement"), ("iterative", "taylor")])
def test_a_restored_state_continues_bit_for_bit(schedule, score):
    config = PruneConfig(names=KERNELS, schedule=schedule, score=score, end=0.8, num_updates=4)
    start = make_params()
    optimizer = prune(optax.adam(0.1), config, start, 10)
    uninterrupted = train(optimizer, start, 9)
    params, state = train(optimizer, start, 5)
    arrays = [np.array(leaf) for leaf in jax.tree.leaves((params, state))]
    structure = jax.tree.structure(jax.eval_shape(lambda p: (p, optimizer.init(p)), start))
    params, state = jax.tree.unflatten(structure, [jnp.asarray(array) for array in arrays])
    restored = optax.GradientTransformation(lambda _: state, optimizer.update)
    resumed = train(restored, params, 4, lambda params, index: make_grads(params, index + 5))
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


@pytest.mark.parametrize("schedule, score", [("cubic", "magnitude"), ("iterative", "taylor")])
def test_masks_scores_and_rewind_values_are_sharded_like_parameters(schedule, score):
    """optax.tree.map_params, which assigns the sharding of a state, must treat them as parameters."""
    params = make_params()
    marks = leaf_names(params)
    marks = jax.tree.unflatten(jax.tree.structure(params), list(marks))
    config = PruneConfig(names=KERNELS, schedule=schedule, score=score)
    for optimizer in (
        prune(optax.adam(0.1), config, params, 10),
        hold_zeros(optax.adam(0.1), KERNELS, params),
    ):
        state = jax.eval_shape(optimizer.init, params)
        marked = optax.tree.map_params(
            optimizer, lambda _, mark: mark, state, marks, transform_non_params=lambda _: "count"
        )
        assert marked.masks == marks and marked.inner[0].mu == marks and marked.inner[0].count == "count"
        if schedule == "iterative" and hasattr(marked, "rewind"):
            assert marked.rewind == marks and marked.scores == marks and marked.count == "count"


def test_zeros_of_matched_parameters_are_held():
    params = jax.tree.map(lambda p: jnp.where(jnp.abs(p) < 0.5, 0, p), make_params())
    optimizer = hold_zeros(optax.adamw(0.1), KERNELS, jax.eval_shape(lambda: params))
    after, _ = train(optimizer, params, 3)
    for name in ("up", "down"):
        np.testing.assert_array_equal(after[name]["kernel"] == 0, params[name]["kernel"] == 0)
        assert 0.2 < np.mean(after[name]["kernel"] == 0) < 0.6
    assert np.asarray(params["items"]["table"] == 0).any() and np.asarray(after["items"]["table"]).all()
    free, _ = train(optax.adamw(0.1), params, 3)
    np.testing.assert_array_equal(after["items"]["table"], free["items"]["table"])


def test_the_state_is_not_an_alias_of_the_parameters():
    """Otherwise a step that donates its parameters would delete the rewind values."""
    params = make_params()
    config = PruneConfig(names=KERNELS, schedule="iterative")
    state = prune(optax.sgd(0.1), config, params, 10).init(params)
    jax.tree.map(lambda x: x.delete(), params)
    assert np.isfinite(state.rewind["items"]["table"]).all()


# Errors


def test_a_pattern_without_match_lists_the_names():
    for make in (
        lambda params: prune(optax.sgd(0.1), PruneConfig(names="blocks.*"), params, 10),
        lambda params: hold_zeros(optax.sgd(0.1), "blocks.*", params),
        lambda params: share_of_zeros(params, "blocks.*"),
    ):
        with pytest.raises(ValueError, match=r"(names|hold)='blocks\.\*' matches no parameter.*up/kernel"):
            make(make_params())


def test_empty_names_leave_the_optimizer_unchanged():
    inner = optax.sgd(0.1)
    assert prune(inner, PruneConfig(), make_params(), 10) is inner


def test_more_weights_than_int32_can_count_are_refused():
    params = {"a": {"kernel": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}}
    with pytest.raises(ValueError, match="matches 2147483648 weights"):
        prune(optax.sgd(0.1), ONCE, params, 10)
    prune(optax.sgd(0.1), ONCE, {"a": {"kernel": jax.ShapeDtypeStruct((2**16, 2**15 - 1), jnp.float32)}}, 10)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"share": 1.0}, "share=1.0 must be in [0, 1) (PruneConfig)"),
        ({"share": -0.1}, "share=-0.1 must be in [0, 1)"),
        ({"begin": 0.6}, "begin=0.6 and end=0.5"),
        ({"end": 1.5}, "end=1.5"),
        ({"schedule": "iterative", "end": 1.0}, "begin=0.0 < end=1.0 < 1"),
        ({"schedule": "iterative", "end": 0.0}, "begin=0.0 < end=0.0 < 1"),
        ({"num_updates": 0}, "num_updates=0 must be at least 1"),
        ({"structure": "2:4"}, "share=0.7 must be 0.5 with structure='2:4'"),
        ({"proximal": "l1", "proximal_strength": -1.0}, "proximal_strength=-1.0 must not be negative"),
        ({"proximal": "l1"}, "proximal='l1' is not supported with proximal_strength=0.0"),
        ({"proximal_strength": 0.1}, "proximal='none' is not supported with proximal_strength=0.1"),
    ],
)
def test_invalid_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PruneConfig(**fields)
