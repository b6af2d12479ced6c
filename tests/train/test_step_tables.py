"""Steps whose item embedding table is updated sparsely, or sharded over a mesh."""

import dataclasses

import numpy as np
import pytest
from step_runs import (
    LENGTH,
    MODEL,
    NUM_ITEMS,
    OPTIM,
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


@pytest.mark.parametrize(
    "loss, update", [("sampled", "sgd"), ("in_batch", "adagrad"), ("bce", "adagrad"), ("gbce", "adagrad")]
)
def test_touched_rows_learn_what_a_dense_update_teaches_them(loss, update):
    optim = OptimConfig(type=update, learning_rate=0.5)
    dense = reference(loss, optim=optim)
    for devices, micro_rows in [(1, 2), (4, 1)] if loss == "sampled" else [(2, 2)]:
        assert_close(run(loss, devices, micro_rows, optim=optim, table=update), dense)


@pytest.mark.parametrize("loss, update", [("sampled", "adagrad"), ("in_batch", "sgd"), ("bce", "adagrad")])
def test_spread_rows_learn_the_same_on_every_mesh(loss, update):
    optim = OptimConfig(type=update, learning_rate=0.5)
    dense = reference(loss, optim=optim)
    for data, model in [(1, 1), (8, 1), (2, 4), (1, 8)] if loss == "sampled" else [(2, 4)]:
        spread = run(loss, data, 8 // data, optim=optim, table=update, model_axis=model, layout="rows")
        assert_close(spread, dense)
    tight = {"layout": "rows", "capacity_factor": 0.01}  # many rounds
    assert_close(run(loss, 4, 1, optim=optim, table=update, **tight), dense)


@pytest.mark.parametrize(
    "layout, update",
    [
        ("rows", "rowwise_adagrad"),
        ("dims", "rowwise_adagrad"),
        ("dims", "lazy_adam"),
        ("rows", "catch_up_adam"),
        ("dims", "catch_up_adam"),
    ],
)
def test_every_layout_learns_the_same(layout, update):
    spread = run("sampled", 2, 4, table=update, model_axis=4, layout=layout)
    assert_close(spread, reference("sampled", table=update))


@pytest.mark.parametrize("data, model", [(1, 1), (8, 1), (2, 4), (1, 8)])
def test_a_whole_softmax_over_spread_rows_is_the_same_softmax(data, model):
    optim = OptimConfig(type="adagrad", learning_rate=0.5)
    spread = run("softmax", data, 4 // data or 1, optim=optim, model_axis=model, layout="rows")
    assert_close(spread, reference("softmax", optim=optim))


@pytest.mark.parametrize("layout", ["rows", "dims"])
def test_clipping_is_that_of_the_whole_gradient_in_every_layout(layout):
    optim = dataclasses.replace(OPTIM, clip_norm=0.05)
    dense = reference("sampled", optim=optim)
    assert dense[2][0] > 0.05
    assert_close(run("sampled", 2, 4, optim=optim, table="sgd", model_axis=2, layout=layout), dense)


@pytest.mark.parametrize("update", ["rowwise_adagrad", "lazy_adam"])
def test_rows_that_no_batch_touches_stay(update):
    batch = make_batch()  # whose negatives are drawn from itself
    config = SASRecConfig(width=8, ff_width=8, num_layers=1)
    _, before = init_model(lambda rngs: SASRec(config, NUM_ITEMS, LENGTH, rngs=rngs), seed=0)
    _, params, _ = run("in_batch", 2, 4, table=update, batches=[batch] * 3)
    changed = (params["items"]["embedding"] != np.asarray(before["items"]["embedding"])).any(-1)
    read = np.union1d(batch.items, batch.targets)
    assert 0 < len(read) - 1 < NUM_ITEMS
    np.testing.assert_array_equal(np.flatnonzero(changed), read[read > 0])


def test_an_id_beyond_the_table_shows_in_the_loss():
    step, batch = make_program("sampled", table="sgd"), make_batch()
    for bad in (-1, NUM_ITEMS + 1, 2**30):
        batch.items[0, 0] = bad
        _, metrics = step(step.init(initial_params(MODEL)), place_batch(batch, step.mesh))
        assert np.isnan(metrics["loss"][0] / metrics["loss"][1]), bad
