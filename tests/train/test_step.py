"""A step gives the same result on every mesh and for every division into micro-batches."""

import dataclasses

import jax
import numpy as np
import pytest
import step_runs
from step_runs import (
    LOSSES,
    MODEL,
    NO_LAYER_MODEL,
    NO_LAYERS,
    NUM_ITEMS,
    OPTIM,
    ROWS,
    assert_close,
    initial_params,
    make_batch,
    make_program,
    reference,
    run,
)

from rec_jax.mesh import place_batch
from rec_jax.train.optim import OptimConfig
from rec_jax.tree import leaf_names


@pytest.mark.parametrize("loss", LOSSES)
def test_devices_and_micro_batches_do_not_change_the_result(loss):
    model = () if loss == "softmax" else NO_LAYERS
    for devices, micro_rows in [(2, 2), (8, 1)] if loss == "in_batch" else [(2, 2)]:
        assert_close(run(loss, devices, micro_rows, model=model), reference(loss, model=model))


@pytest.mark.parametrize("data, model, fully_sharded", [(4, 1, True), (2, 4, True), (1, 8, False)])
def test_tensor_parallel_and_fully_sharded_parameters_give_the_same_result(data, model, fully_sharded):
    fields = {"num_heads": 4, "optim": OptimConfig(type="adagrad", learning_rate=0.5, clip_norm=0.1)}
    expected = reference("softmax", **fields)
    assert min(expected[2]) > 0.1  # above clip_norm
    sharded = run("softmax", data, 4 // data or 1, model_axis=model, fully_sharded=fully_sharded, **fields)
    assert_close(sharded, expected)


def test_parameters_and_moments_are_sharded_as_configured():
    step = make_program(devices=2, model_axis=4, fully_sharded=True, num_heads=4, optim=OptimConfig())
    state = step.init(initial_params(dataclasses.replace(MODEL, num_heads=4)))
    names = {**leaf_names(state.params), **leaf_names(state.opt_state[0][0].mu)}
    parts = {name: x.size // x.addressable_shards[0].data.size for name, x in names.items()}
    assert parts["blocks/0/attention/query/kernel"] == parts["blocks/0/ff/down/kernel"] == 8
    assert parts["blocks/0/ff/up/bias"] == 4 and parts["final_norm/scale"] == 2
    assert parts["items/embedding"] == 2


def test_gradients_summed_in_bf16_are_close_to_f32():
    f32, bf16 = reference("softmax"), run("softmax", 4, 2, reduce="bf16")
    np.testing.assert_allclose(bf16[0], f32[0], rtol=1e-2)
    assert bf16[0] != f32[0]


@pytest.mark.parametrize("table", [None, "sgd"])
def test_gradients_are_clipped_by_their_global_norm(table):
    fields = {"steps": 1, "model": NO_LAYERS, "table": table}
    unclipped = run("sampled", **fields)
    limit = unclipped[2][0] / 4
    clipped = run("sampled", optim=dataclasses.replace(OPTIM, clip_norm=limit), **fields)
    expected = jax.tree.map(
        lambda old, new: old + (new - old) / 4, initial_params(NO_LAYER_MODEL), unclipped[1]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), clipped[1], expected)


def test_gradients_below_the_clip_norm_are_unchanged():
    fields = {"steps": 1, "model": NO_LAYERS, "table": "sgd"}
    unclipped = run("sampled", **fields)
    clipped = run("sampled", optim=dataclasses.replace(OPTIM, clip_norm=4 * unclipped[2][0]), **fields)
    jax.tree.map(np.testing.assert_array_equal, clipped[1], unclipped[1])


def test_runs_are_bit_equal_for_equal_seeds_and_differ_for_others(monkeypatch):
    monkeypatch.setattr(step_runs, "cached_step", step_runs.make)  # compile each run
    first, again, other = (run("sampled", 2, 2, steps=2, model=NO_LAYERS, seed=seed) for seed in (0, 0, 1))
    assert first[0] == again[0] != other[0]
    jax.tree.map(np.testing.assert_array_equal, first[1], again[1])


def test_rows_of_padding_do_not_change_the_result():
    batch = make_batch()
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    assert_close(run(batches=[batch], steps=1), run(batches=[padded], steps=1))


def test_a_tiny_data_set_is_memorised_and_the_state_is_donated():
    fields = (("width", 16), ("ff_width", 16), ("num_layers", 2), ("dropout", 0.0))
    step = make_program(optim=OptimConfig(learning_rate=1e-2), model=fields)
    state = step.init(initial_params(dataclasses.replace(MODEL, **dict(fields))))
    batch = make_batch()
    batch.items[:, 0] = np.arange(1, ROWS + 1)  # equal first items would have different next items
    placed = place_batch(batch, step.mesh)
    table = state.params["items"]["embedding"]
    for _ in range(300):
        state, metrics = step(state, placed)
    assert table.is_deleted()
    per_token = float(metrics["loss"][0] / metrics["loss"][1])
    assert per_token < 0.5 < np.log(NUM_ITEMS)


def test_micro_rows_must_divide_the_rows_of_a_device():
    with pytest.raises(ValueError, match="micro_rows=3 does not divide the 8 rows"):
        run(micro_rows=3, steps=1)
