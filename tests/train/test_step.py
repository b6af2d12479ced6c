"""One step on every mesh, however divided, is the same step."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from rec_jax.data.datasets import DataConfig
from rec_jax.experiment import ExperimentConfig, Program, model_builder
from rec_jax.mesh import MeshConfig, make_mesh, place_batch
from rec_jax.models.base import get_table, init_model, with_table
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.train.loop import TrainConfig
from rec_jax.train.losses import LossConfig
from rec_jax.train.optim import OptimConfig, make_optimizer
from rec_jax.train.step import init_state, make_train_step
from rec_jax.train.tables import TableConfig
from rec_jax.tree import leaf_names

NUM_ITEMS, ROWS, LENGTH = 40, 8, 12


def make_batch(seed=0, rows=ROWS):
    """Packed rows of several segments, some with padding behind, one all padding."""
    rng = np.random.default_rng(seed)
    batch = {n: np.zeros((rows, LENGTH), np.int32) for n in ("items", "targets", "segments", "positions")}
    for row in range(rows - 1):
        at, segment = 0, 1
        while at < LENGTH - 2:
            length = int(rng.integers(1, LENGTH - at))
            inside = slice(at, at + length)
            walk = rng.integers(1, NUM_ITEMS + 1, length + 1)
            batch["items"][row, inside], batch["targets"][row, inside] = walk[:-1], walk[1:]
            batch["segments"][row, inside], batch["positions"][row, inside] = segment, np.arange(length)
            at, segment = at + length, segment + 1
    return batch


LOSSES = {
    "softmax": LossConfig(type="softmax"),
    "sampled": LossConfig(type="sampled_softmax", num_negatives=5, sampler="popularity"),
    "in_batch": LossConfig(type="sampled_softmax", num_negatives=5, sampler="in_batch", sharing="batch"),
    "bce": LossConfig(type="bce", num_negatives=1, sharing="position", exclude_history=True),
    "gbce": LossConfig(type="gbce", num_negatives=5),
}


OPTIM = OptimConfig(type="sgd", learning_rate=0.5)
COUNTS = np.arange(NUM_ITEMS + 1)


def make_program(
    loss="softmax", devices=1, micro_rows=8, precision="f32", seed=0, optim=OPTIM, table=None, model_axis=1,
    num_heads=1, fully_sharded=False, reduce="f32", **table_fields,
):  # fmt: skip
    """table: an update of touched rows, or None for the dense one."""
    table_fields = {"layout": "replicated", "hot_rows": 8} | table_fields
    config = ExperimentConfig(
        seed=seed,
        data=DataConfig(max_len=LENGTH),
        model=SASRecConfig(width=8, ff_width=8, num_layers=1, dropout=0.3, num_heads=num_heads),
        loss=LOSSES[loss],
        optim=optim,
        train=TrainConfig(batch_rows=ROWS, micro_rows=micro_rows, precision=precision),
        table=TableConfig(optimizer=table or "dense", learning_rate=optim.learning_rate, **table_fields),
        mesh=MeshConfig(data=devices, model=model_axis, fully_sharded=fully_sharded, reduce=reduce),
    )
    return Program(config, NUM_ITEMS, make_mesh(config.mesh), 10, COUNTS)


@functools.cache
def initial_params(model_config):
    config = ExperimentConfig(data=DataConfig(max_len=LENGTH), model=model_config)
    return jax.device_get(init_model(model_builder(config, NUM_ITEMS), seed=0)[1])  # steps consume theirs


def run(loss="softmax", devices=1, micro_rows=8, steps=3, batches=None, **fields):
    program = make_program(loss, devices, micro_rows, **fields)
    step, catch_up = program.make_step(), program.make_catch_up()
    params = initial_params(program.config.model)
    batches = program.prepare([make_batch(index) for index in range(steps)] if batches is None else batches)
    state = init_state(params, program.optimizer, program.mesh, program.item_table, program.specs)
    losses, norms = [], []
    for index in range(steps):
        state, metrics = step(state, place_batch(batches[index], program.mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        norms.append(float(metrics["grad_norm"][0]))
    assert step._cache_size() == 1  # one trace over all steps
    state = catch_up(state) if catch_up else state
    params = state.params
    if program.item_table:
        params = with_table(params, program.item_table.layout.unplace(get_table(params)))
    return losses, jax.device_get(params), norms


reference = functools.cache(run)  # on one device


def assert_close(a, b, rtol=2e-5):
    np.testing.assert_allclose(a[0], b[0], rtol=rtol)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(a[2], b[2], rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_division_into_devices_and_micro_steps_changes_nothing(loss):
    whole = reference(loss)
    for devices, micro_rows in [(2, 2), (8, 1)] if loss in ("softmax", "in_batch") else [(2, 2)]:
        assert_close(run(loss, devices, micro_rows), whole)


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
        ("hot_cold", "lazy_adam"),
        ("rows", "catch_up_adam"),
        ("hot_cold", "catch_up_adam"),
    ],
)
def test_every_layout_learns_the_same(layout, update):
    spread = run("sampled", 2, 4, table=update, model_axis=4, layout=layout)
    assert_close(spread, reference("sampled", table=update))


@pytest.mark.parametrize(
    "loss, layout, data, model",
    [("sampled", "replicated", 4, 1), ("in_batch", "rows", 2, 4), ("bce", "dims", 1, 2)],
)
def test_ids_deduped_by_the_loader_are_those_of_the_device(loss, layout, data, model):
    fields = {"table": "adagrad", "layout": layout, "model_axis": model}
    by_host, by_device = (run(loss, data, 2, host_dedupe=flag, **fields) for flag in (True, False))
    assert by_host[0] == by_device[0]
    jax.tree.map(np.testing.assert_array_equal, by_host[1], by_device[1])


@pytest.mark.parametrize("data, model", [(1, 1), (8, 1), (2, 4), (1, 8)])
def test_a_whole_softmax_over_spread_rows_is_the_same_softmax(data, model):
    optim = OptimConfig(type="adagrad", learning_rate=0.5)
    spread = run("softmax", data, 4 // data or 1, optim=optim, model_axis=model, layout="rows")
    assert_close(spread, reference("softmax", optim=optim))


@pytest.mark.parametrize("data, model, fully_sharded", [(8, 1, True), (2, 4, True), (1, 8, False)])
def test_tensor_parallel_and_fully_sharded_parameters_learn_the_same(data, model, fully_sharded):
    fields = {"num_heads": 4, "optim": OptimConfig(type="adagrad", learning_rate=0.5, clip_norm=0.1)}
    whole = reference("softmax", **fields)
    assert min(whole[2]) > 0.1
    split = run("softmax", data, 4 // data or 1, model_axis=model, fully_sharded=fully_sharded, **fields)
    assert_close(split, whole)


def test_parameters_and_moments_are_split_as_asked():
    program = make_program(
        devices=2, model_axis=4, fully_sharded=True, num_heads=4, optim=OptimConfig()
    )  # fmt: skip
    state = program.init_state()
    names = {**leaf_names(state.params), **leaf_names(state.opt_state[0].mu)}
    parts = {name: x.size // x.addressable_shards[0].data.size for name, x in names.items()}
    assert parts["blocks/0/attention/query/kernel"] == parts["blocks/0/ff/down/kernel"] == 8
    assert parts["blocks/0/ff/up/bias"] == 4 and parts["final_norm/scale"] == 2
    assert parts["items/embedding"] == 2


def test_gradients_summed_in_bf16_are_near():
    f32, bf16 = reference("softmax"), run("softmax", 4, 2, reduce="bf16")
    np.testing.assert_allclose(bf16[0], f32[0], rtol=1e-2)
    assert bf16[0] != f32[0]


@pytest.mark.parametrize("layout", ["rows", "dims"])
def test_clipping_is_that_of_the_whole_gradient_in_every_layout(layout):
    optim = dataclasses.replace(OPTIM, clip_norm=0.05)
    dense = reference("sampled", optim=optim)
    assert dense[2][0] > 0.05
    assert_close(run("sampled", 2, 4, optim=optim, table="sgd", model_axis=2, layout=layout), dense)


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


@pytest.mark.parametrize("update", ["rowwise_adagrad", "lazy_adam"])
def test_rows_that_no_batch_touches_stay(update):
    batch = make_batch()  # whose negatives are drawn from itself
    config = SASRecConfig(width=8, ff_width=8, num_layers=1)
    _, before = init_model(lambda rngs: SASRec(config, NUM_ITEMS, LENGTH, rngs=rngs), seed=0)
    _, params, _ = run("in_batch", 2, 4, table=update, batches=[batch] * 3)
    changed = (params["items"]["embedding"] != np.asarray(before["items"]["embedding"])).any(-1)
    read = np.union1d(batch["items"], batch["targets"])
    assert 0 < len(read) - 1 < NUM_ITEMS
    np.testing.assert_array_equal(np.flatnonzero(changed), read[read > 0])


@pytest.mark.parametrize("bad", [-1, NUM_ITEMS + 1, 2**30])
def test_an_id_beyond_the_table_shows_in_the_loss(bad):
    batch = make_batch()
    batch["items"][0, 0] = bad
    losses, _, _ = run("sampled", table="sgd", batches=[batch], steps=1)
    assert np.isnan(losses[0])


def test_two_runs_are_bit_equal_and_seeds_differ():
    first, again, other = run("sampled", 2, 2), run("sampled", 2, 2), run("sampled", 2, 2, seed=1)
    assert first[0] == again[0] != other[0]
    jax.tree.map(np.testing.assert_array_equal, first[1], again[1])


def test_empty_rows_change_nothing():
    batch = make_batch()
    padded = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
    assert_close(run(batches=[batch], steps=1), run(batches=[padded], steps=1))


def test_bf16_computes_near_f32_and_keeps_f32_parameters():
    f32, bf16 = run(), run(precision="bf16")
    np.testing.assert_allclose(bf16[0], f32[0], rtol=2e-2)
    assert bf16[0] != f32[0]
    assert {x.dtype for x in jax.tree.leaves(bf16[1])} == {np.dtype(np.float32)}


def test_the_state_is_donated():
    config = SASRecConfig(width=8, ff_width=8)
    model, params = init_model(lambda rngs: SASRec(config, NUM_ITEMS, LENGTH, rngs=rngs), seed=0)
    optimizer = optax.adam(1e-3)
    mesh = make_mesh(MeshConfig(data=1))
    step = make_train_step(model, optimizer, LOSSES["softmax"], None, mesh, micro_rows=8)
    state = init_state(params, optimizer, mesh)
    table = state.params["items"]["embedding"]
    step(state, place_batch(make_batch(), mesh))
    assert table.is_deleted()


def test_a_tiny_set_is_learnt_by_heart():
    config = SASRecConfig(width=16, ff_width=16, dropout=0.0)
    model, params = init_model(lambda rngs: SASRec(config, NUM_ITEMS, LENGTH, rngs=rngs), seed=0)
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2), params, 300)
    mesh = make_mesh(MeshConfig(data=1))
    step = make_train_step(model, optimizer, LOSSES["softmax"], None, mesh, micro_rows=8)
    state = init_state(params, optimizer, mesh)
    batch = make_batch()
    batch["items"][:, 0] = np.arange(1, ROWS + 1)  # first items alike would have several futures
    placed = place_batch(batch, mesh)
    for _ in range(300):
        state, metrics = step(state, placed)
    per_token = float(metrics["loss"][0] / metrics["loss"][1])
    assert per_token < 0.5 < np.log(NUM_ITEMS)


def test_micro_rows_must_divide():
    with pytest.raises(ValueError, match="micro_rows=3"):
        run(micro_rows=3, steps=1)
