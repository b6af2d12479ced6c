"""Steps with sparse updates of the item embedding table, and with sharded tables."""

import dataclasses

import numpy as np
import pytest
from step_runs import (
    NO_LAYER_MODEL,
    NO_LAYERS,
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
    fields = {"optim": OptimConfig(type=update, learning_rate=0.5)}
    if loss != "sampled":
        fields["model"] = NO_LAYERS
    dense = reference(loss, **fields)
    for devices, micro_rows in [(1, 2), (2, 2)] if loss == "sampled" else [(2, 2)]:
        assert_close(run(loss, devices, micro_rows, table=update, **fields), dense)


@pytest.mark.parametrize("loss, update", [("sampled", "adagrad"), ("in_batch", "sgd"), ("bce", "adagrad")])
def test_row_sharded_tables_give_the_same_result_on_every_mesh(loss, update):
    fields = {"optim": OptimConfig(type=update, learning_rate=0.5), "model": NO_LAYERS}
    dense = reference(loss, **fields)
    for data, model in [(1, 1), (2, 1), (2, 4), (1, 2)] if loss == "sampled" else [(2, 4)]:
        sharded = run(loss, data, 8 // data, table=update, model_axis=model, layout="rows", **fields)
        assert_close(sharded, dense)


def test_exchanges_in_many_rounds_give_the_same_result():
    fields = {"optim": OptimConfig(type="adagrad", learning_rate=0.5), "model": NO_LAYERS}
    sharded = run("sampled", 4, 1, table="adagrad", layout="rows", capacity_factor=0.01, **fields)
    assert_close(sharded, reference("sampled", **fields))


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
    fields = {"table": update, "model": NO_LAYERS}
    sharded = run("sampled", 2, 4, model_axis=2, layout=layout, **fields)
    assert_close(sharded, reference("sampled", **fields))


@pytest.mark.parametrize("data, model", [(2, 1), (2, 4), (1, 2)])
def test_a_full_softmax_over_a_row_sharded_table_gives_the_same_result(data, model):
    fields = {"optim": OptimConfig(type="adagrad", learning_rate=0.5)}
    if (data, model) != (2, 4):
        fields["model"] = NO_LAYERS
    sharded = run("softmax", data, 4 // data or 1, model_axis=model, layout="rows", **fields)
    assert_close(sharded, reference("softmax", **fields))


@pytest.mark.parametrize("layout", ["rows", "dims"])
def test_clipping_uses_the_global_norm_in_every_layout(layout):
    fields = {"optim": dataclasses.replace(OPTIM, clip_norm=0.05), "model": NO_LAYERS}
    dense = reference("sampled", **fields)
    assert dense[2][0] > 0.05
    assert_close(run("sampled", 2, 4, table="sgd", model_axis=2, layout=layout, **fields), dense)


@pytest.mark.parametrize("update", ["rowwise_adagrad", "lazy_adam"])
def test_entries_that_no_batch_reads_do_not_change(update):
    batch = make_batch()  # "in_batch" draws negatives from it
    _, params, _ = run("in_batch", 2, 4, table=update, batches=[batch] * 3, model=NO_LAYERS)
    before = initial_params(NO_LAYER_MODEL)
    changed = (params["items"]["embedding"] != before["items"]["embedding"]).any(-1)
    read = np.union1d(batch.items, batch.targets)
    assert 0 < len(read) - 1 < NUM_ITEMS
    np.testing.assert_array_equal(np.flatnonzero(changed), read[read > 0])


def test_an_id_outside_the_table_makes_the_loss_nan():
    step, batch = make_program("sampled", table="sgd", model=NO_LAYERS), make_batch()
    params = initial_params(NO_LAYER_MODEL)
    for bad in (-1, NUM_ITEMS + 1, 2**30):
        batch.items[0, 0] = bad
        _, metrics = step(step.init(params), place_batch(batch, step.mesh))
        assert np.isnan(metrics["loss"][0] / metrics["loss"][1]), bad
