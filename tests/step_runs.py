"""Training steps of a small model on any mesh, shared by tests."""

import dataclasses
import functools

import jax
import numpy as np

from rec_jax.compress.config import CompressConfig
from rec_jax.data.batch import Batch
from rec_jax.data.datasets import DataConfig
from rec_jax.mesh import MeshConfig, make_mesh, place_batch
from rec_jax.models.base import define_model, init_model
from rec_jax.models.registry import model_builder
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.objectives.augment import AugmentConfig
from rec_jax.objectives.contrastive import ContrastiveConfig
from rec_jax.objectives.token_loss import BCEConfig, GBCEConfig, SampledSoftmaxConfig, SoftmaxConfig
from rec_jax.run_config import ExperimentConfig
from rec_jax.tables.config import TableConfig
from rec_jax.train.loop import TrainConfig
from rec_jax.train.optim import OptimConfig
from rec_jax.train.precision import PrecisionConfig
from rec_jax.training import make_step

NUM_ITEMS, ROWS, LENGTH = 40, 8, 12


def make_batch(seed=0, rows=ROWS):
    """Packed rows of several segments, some with padding at the end; the last row is all padding."""
    rng = np.random.default_rng(seed)
    items, targets, segments, positions = np.zeros((4, rows, LENGTH), np.int32)
    for row in range(rows - 1):
        start, segment = 0, 1
        while start < LENGTH - 2:
            length = int(rng.integers(1, LENGTH - start))
            columns = slice(start, start + length)
            history = rng.integers(1, NUM_ITEMS + 1, length + 1)
            items[row, columns], targets[row, columns] = history[:-1], history[1:]
            segments[row, columns], positions[row, columns] = segment, np.arange(length)
            start, segment = start + length, segment + 1
    return Batch({"item": items}, segments, positions, {"item": targets})


LOSSES = {
    "softmax": SoftmaxConfig(),
    "sampled": SampledSoftmaxConfig(num_negatives=5, sampler="popularity"),
    "in_batch": SampledSoftmaxConfig(num_negatives=5, sampler="in_batch", sharing="batch"),
    "bce": BCEConfig(num_negatives=1, sharing="position", exclude_history=True),
    "gbce": GBCEConfig(num_negatives=5),
}


MODEL = SASRecConfig(width=8, ff_width=8, num_layers=1, dropout=0.3)
NO_LAYERS = (("num_layers", 0),)  # compiles faster; for tests of losses and tables
NO_LAYER_MODEL = dataclasses.replace(MODEL, **dict(NO_LAYERS))
F32 = PrecisionConfig()
OPTIM = OptimConfig(type="sgd", learning_rate=0.5)
COUNTS = np.arange(NUM_ITEMS + 1)


def make_config(
    loss="softmax", devices=1, micro_rows=8, precision=F32, seed=0, optim=OPTIM, table=None, model_axis=1,
    num_heads=1, num_experts=0, fully_sharded=False, reduce="f32", compress=None, total_steps=10, teachers=(),
    base=None, model=(), augment=None, contrastive=None, **table_fields,
):  # fmt: skip
    """Returns (config, options of `make`). loss: a key of LOSSES, or a loss config. model: other fields of
    the model config. table: optimizer of sparse updates of the item embedding table; None = dense updates."""
    table_fields = {"layout": "replicated"} | table_fields
    config = ExperimentConfig(
        seed=seed,
        data=DataConfig(max_len=LENGTH),
        model=dataclasses.replace(MODEL, num_heads=num_heads, num_experts=num_experts, **dict(model)),
        loss=LOSSES[loss] if isinstance(loss, str) else loss,
        optim=optim,
        train=TrainConfig(batch_rows=ROWS, micro_rows=micro_rows),
        precision=precision,
        table=TableConfig(optimizer=table or "dense", learning_rate=optim.learning_rate, **table_fields),
        mesh=MeshConfig(data=devices, model=model_axis, fully_sharded=fully_sharded, reduce=reduce),
        compress=compress or CompressConfig(),
        augment=augment or AugmentConfig(),
        contrastive=contrastive or ContrastiveConfig(),
    )
    return config, {"total_steps": total_steps, "teachers": teachers, "base": base}


def make_program(*args, **fields):
    """Returns the step of the config of `make_config`."""
    config, options = make_config(*args, **fields)
    return make(config, **options)


def make(config, total_steps=10, teachers=(), base=None, neighbours=None):
    """Returns the training step of a config, with the item counts COUNTS."""
    model = define_model(model_builder(config.model, NUM_ITEMS, LENGTH))
    mesh, options = make_mesh(config.mesh), {"teachers": teachers, "base": base, "neighbours_VK": neighbours}
    return make_step(config, model, COUNTS, mesh, total_steps=total_steps, **options)


cached_step = functools.cache(make)  # compiles once for all runs with the same config


@functools.cache
def initial_params(model_config):
    """Host arrays, because a step donates its state."""
    return jax.device_get(init_model(model_builder(model_config, NUM_ITEMS, LENGTH), seed=0)[1])


def run(loss="softmax", devices=1, micro_rows=8, steps=3, batches=None, neighbours=None, **fields):
    """Returns (loss per token of each step, final parameters, gradient norm of each step)."""
    config, options = make_config(loss, devices, micro_rows, **fields)
    if neighbours is None and not options["teachers"] and options["base"] is None:
        step = cached_step(config, options["total_steps"])
    else:  # arrays cannot be keys of a cache
        step = make(config, neighbours=neighbours, **options)
    num_traces = step._jitted._cache_size()
    state = step.init(initial_params(config.model))
    batches = [make_batch(index) for index in range(steps)] if batches is None else batches
    losses, norms = [], []
    for index in range(steps):
        state, metrics = step(state, place_batch(batches[index], step.mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        norms.append(float(metrics["grad_norm"][0]))
    assert step._jitted._cache_size() <= num_traces + 1  # at most one trace for all steps
    state = step.catch_up(state) if step.catch_up else state
    return losses, jax.device_get(step.tables.unplace(state.params)), norms


reference = functools.cache(run)  # on one device


def assert_close(a, b, rtol=2e-5):
    np.testing.assert_allclose(a[0], b[0], rtol=rtol)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(a[2], b[2], rtol=1e-4)
