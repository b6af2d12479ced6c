"""Steps with sparse updates of the item embedding table, and with sharded tables."""

import dataclasses

import numpy as np
import pytest
from step_runs import (
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
from rec_jax.train.optim import OptimConfig


@pytest.mark.parametrize(
    "loss, update", [("sampled", "sgd"), ("in_batch", "adagrad"), ("bce", "adagrad"), ("gbce", "adagrad")]
)
def test_sparse_updates_equal_dense_updates(loss, update):
    optim = OptimConfig(type=update, learning_rate=0.5)
    dense = reference(loss, optim=optim)
    for devices, micro_rows in [(1, 2), (4, 1)] if loss == "sampled" else [(2, 2)]:
        assert_close(run(loss, devices, micro_rows, optim=optim, table=update), dense)


@pytest.mark.parametrize("loss, update", [("sampled", "adagrad"), ("in_batch", "sgd"), ("bce", "adagrad")])
def test_row_sharded_tables_give_the_same_result_on_every_mesh(loss, update):
    optim = OptimConfig(type=update, learning_rate=0.5)
    dense = reference(loss, optim=optim)
    for data, model in [(1, 1), (8, 1), (2, 4), (1, 8)] if loss == "sampled" else [(2, 4)]:
        sharded = run(loss, data, 8 // data, optim=optim, table=update, model_axis=model, layout="rows")
        assert_close(sharded, dense)


@pytest.mark.parametrize("loss, update", [("sampled", "adagrad"), ("in_batch", "sgd")])
def test_exchanges_in_many_rounds_give_the_same_result(loss, update):
    optim = OptimConfig(type=update, learning_rate=0.5)
    fields = {"layout": "rows", "capacity_factor": 0.01, "optim": optim, "table": update}
    assert_close(run(loss, 4, 1, **fields), reference(loss, optim=optim))


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
def test_every_layout_gives_the_same_result(layout, update):
    sharded = run("sampled", 2, 4, table=update, model_axis=4, layout=layout)
    assert_close(sharded, reference("sampled", table=update))


@pytest.mark.parametrize("data, model", [(1, 1), (8, 1), (2, 4), (1, 8)])
def test_a_full_softmax_over_a_row_sharded_table_gives_the_same_result(data, model):
    optim = OptimConfig(type="adagrad", learning_rate=0.5)
    sharded = run("softmax", data, 4 // data or 1, optim=optim, model_axis=model, layout="rows")
    assert_close(sharded, reference("softmax", optim=optim))


@pytest.mark.parametrize("layout", ["rows", "dims"])
def test_clipping_uses_the_global_norm_in_every_layout(layout):
    optim = dataclasses.replace(OPTIM, clip_norm=0.05)
    dense = reference("sampled", optim=optim)
    assert dense[2][0] > 0.05
    assert_close(run("sampled", 2, 4, optim=optim, table="sgd", model_axis=2, layout=layout), dense)


@pytest.mark.parametrize("update", ["rowwise_adagrad", "lazy_adam"])
def test_entries_that_no_batch_reads_do_not_change(update):
    batch = make_batch()  # "in_batch" draws negatives from it
    _, params, _ = run("in_batch", 2, 4, table=update, batches=[batch] * 3)
    changed = (params["items"]["embedding"] != initial_params(MODEL)["items"]["embedding"]).any(-1)
    read = np.union1d(batch.items, batch.targets)
    assert 0 < len(read) - 1 < NUM_ITEMS
    np.testing.assert_array_equal(np.flatnonzero(changed), read[read > 0])


def test_an_id_outside_the_table_makes_the_loss_nan():
    step, batch = make_program("sampled", table="sgd"), make_batch()
    for bad in (-1, NUM_ITEMS + 1, 2**30):
        batch.items[0, 0] = bad
        _, metrics = step(step.init(initial_params(MODEL)), place_batch(batch, step.mesh))
        assert np.isnan(metrics["loss"][0] / metrics["loss"][1]), bad
