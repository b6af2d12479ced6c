"""One step on every mesh, however divided, is the same step."""

import dataclasses

import jax
import numpy as np
import pytest
from step_runs import (
    LENGTH,
    LOSSES,
    MODEL,
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
from rec_jax.models.base import init_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.train.optim import OptimConfig
from rec_jax.train.precision import PrecisionConfig
from rec_jax.tree import leaf_names


@pytest.mark.parametrize("loss", LOSSES)
def test_the_division_into_devices_and_micro_steps_changes_nothing(loss):
    whole = reference(loss)
    for devices, micro_rows in [(2, 2), (8, 1)] if loss in ("softmax", "in_batch") else [(2, 2)]:
        assert_close(reference(loss, devices, micro_rows), whole)


@pytest.mark.parametrize("data, model, fully_sharded", [(8, 1, True), (2, 4, True), (1, 8, False)])
def test_tensor_parallel_and_fully_sharded_parameters_learn_the_same(data, model, fully_sharded):
    fields = {"num_heads": 4, "optim": OptimConfig(type="adagrad", learning_rate=0.5, clip_norm=0.1)}
    whole = reference("softmax", **fields)
    assert min(whole[2]) > 0.1
    split = run("softmax", data, 4 // data or 1, model_axis=model, fully_sharded=fully_sharded, **fields)
    assert_close(split, whole)


def test_parameters_and_moments_are_split_as_asked():
    step = make_program(devices=2, model_axis=4, fully_sharded=True, num_heads=4, optim=OptimConfig())
    state = step.init(initial_params(dataclasses.replace(MODEL, num_heads=4)))
    names = {**leaf_names(state.params), **leaf_names(state.opt_state[0][0].mu)}
    parts = {name: x.size // x.addressable_shards[0].data.size for name, x in names.items()}
    assert parts["blocks/0/attention/query/kernel"] == parts["blocks/0/ff/down/kernel"] == 8
    assert parts["blocks/0/ff/up/bias"] == 4 and parts["final_norm/scale"] == 2
    assert parts["items/embedding"] == 2


def test_gradients_summed_in_bf16_are_near():
    f32, bf16 = reference("softmax"), run("softmax", 4, 2, reduce="bf16")
    np.testing.assert_allclose(bf16[0], f32[0], rtol=1e-2)
    assert bf16[0] != f32[0]


@pytest.mark.parametrize("table", [None, "sgd"])
def test_the_gradient_is_clipped_by_the_norm_of_all_of_it(table):
    free = run("sampled", steps=1, table=table)
    config = SASRecConfig(width=8, ff_width=8, num_layers=1)
    _, before = init_model(lambda rngs: SASRec(config, NUM_ITEMS, LENGTH, rngs=rngs), seed=0)
    limit = free[2][0] / 4
    clipped = run("sampled", steps=1, table=table, optim=dataclasses.replace(OPTIM, clip_norm=limit))
    expected = jax.tree.map(lambda old, new: old + (new - old) / 4, before, free[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), clipped[1], expected)
    loose = run("sampled", steps=1, table=table, optim=dataclasses.replace(OPTIM, clip_norm=4 * limit + 1))
    jax.tree.map(np.testing.assert_array_equal, loose[1], free[1])


def test_two_runs_are_bit_equal_and_seeds_differ():
    first, again, other = reference("sampled", 2, 2), run("sampled", 2, 2), run("sampled", 2, 2, seed=1)
    assert first[0] == again[0] != other[0]
    jax.tree.map(np.testing.assert_array_equal, first[1], again[1])


def test_empty_rows_change_nothing():
    batch = make_batch()
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    assert_close(run(batches=[batch], steps=1), run(batches=[padded], steps=1))


def test_bf16_computes_near_f32_and_keeps_f32_parameters():
    f32, bf16 = reference("softmax"), run(precision=PrecisionConfig(compute="bf16"))
    np.testing.assert_allclose(bf16[0], f32[0], rtol=2e-2)
    assert bf16[0] != f32[0]
    assert {x.dtype for x in jax.tree.leaves(bf16[1])} == {np.dtype(np.float32)}


def test_a_tiny_set_is_learnt_by_heart_and_the_state_is_donated():
    fields = (("width", 16), ("ff_width", 16), ("num_layers", 2), ("dropout", 0.0))
    step = make_program(optim=OptimConfig(learning_rate=1e-2), model=fields)
    state = step.init(initial_params(dataclasses.replace(MODEL, **dict(fields))))
    batch = make_batch()
    batch.items[:, 0] = np.arange(1, ROWS + 1)  # first items alike would have several futures
    placed = place_batch(batch, step.mesh)
    table = state.params["items"]["embedding"]
    for _ in range(300):
        state, metrics = step(state, placed)
    assert table.is_deleted()
    per_token = float(metrics["loss"][0] / metrics["loss"][1])
    assert per_token < 0.5 < np.log(NUM_ITEMS)


def test_micro_rows_must_divide():
    with pytest.raises(ValueError, match="micro_rows=3"):
        run(micro_rows=3, steps=1)
