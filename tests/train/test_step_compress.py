"""Compression in the training step: pruning masks, quantization, teachers and LoRA adapters, on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_runs import LENGTH, NUM_ITEMS, initial_params, make_batch, make_program

from rec_jax.compress.config import CompressConfig
from rec_jax.compress.factor import LoraConfig
from rec_jax.compress.prune import PruneConfig
from rec_jax.compress.quant import QuantConfig, dequantize_params, quantize_params
from rec_jax.compress.shrink import ShrinkConfig
from rec_jax.mesh import place_batch
from rec_jax.models.base import define_model, init_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.objectives.distill import DistillConfig
from rec_jax.tables.layouts import shardings
from rec_jax.train.optim import OptimConfig
from rec_jax.train.precision import PrecisionConfig
from rec_jax.tree import leaf_names

WEIGHTS = r".*(kernel|embedding)"
MODEL = SASRecConfig(width=8, ff_width=8, num_layers=1, dropout=0.3)
ADAGRAD = OptimConfig(type="adagrad", learning_rate=0.1)


def train(step, state, first, last, num_batches=100):
    """Runs steps first..last - 1; returns (state, loss per token of each step)."""
    losses = []
    for index in range(first, last):
        state, metrics = step(state, place_batch(make_batch(index % num_batches), step.mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state, losses


def zeros(params) -> dict:
    """{parameter name: bool mask of its zeros}."""
    return {name: np.asarray(x) == 0 for name, x in leaf_names(jax.device_get(params)).items()}


PRUNE = CompressConfig(prune=PruneConfig(names=WEIGHTS, share=0.6, score="taylor", end=0.5, num_updates=5))
SHARDED = {"num_heads": 4, "micro_rows": 2, "fully_sharded": True}


def test_masks_survive_training_and_a_move_to_another_mesh():
    fields = {"compress": PRUNE, "optim": OptimConfig(type="adamw", weight_decay=0.1), "num_heads": 4}
    one_device = make_program(**fields)
    _, expected = train(one_device, one_device.init(initial_params(MODEL)), 0, 10)
    first = make_program(devices=8, **fields | SHARDED | {"micro_rows": 1})
    state_8, losses = train(first, first.init(initial_params(MODEL)), 0, 4)
    before = zeros(state_8.params)
    second = make_program(devices=2, model_axis=4, **fields | SHARDED)
    moved = jax.device_put(jax.device_get(state_8), shardings(second.mesh, second.state_specs))
    state_2, later_losses = train(second, moved, 4, 10)
    np.testing.assert_allclose(losses + later_losses, expected, rtol=1e-3)
    after = zeros(state_2.params)
    matched = [name for name in after if name.endswith(("kernel", "embedding"))]
    for name in matched:
        assert np.all(after[name][before[name]]), name  # weights masked before the move are still masked
    share = sum(after[name].sum() for name in matched) / sum(after[name].size for name in matched)
    assert 0.6 <= share < 0.61
    masks = leaf_names(jax.device_get(state_2.opt_state[0].masks))
    for name in matched:
        np.testing.assert_array_equal(~masks[name], after[name])
    kernel = state_2.opt_state[0].masks["blocks"][0]["ff"]["up"]["kernel"]
    assert kernel.sharding == state_2.params["blocks"][0]["ff"]["up"]["kernel"].sharding


def test_initial_zeros_stay_zero():
    base = jax.tree.map(lambda x: np.where(np.abs(x) < 0.02, 0, x), initial_params(MODEL))
    hold = CompressConfig(prune=PruneConfig(hold=WEIGHTS))
    step = make_program(compress=hold, optim=ADAGRAD)
    state, _ = train(step, step.init(base), 0, 3)
    for name, was_zero in zeros(base).items():
        if name.endswith(("kernel", "embedding")):
            is_zero = zeros(state.params)[name]
            assert was_zero.any() and np.array_equal(is_zero, was_zero), name


@functools.cache
def uncompressed_losses():
    step = make_program(optim=ADAGRAD)
    return train(step, step.init(initial_params(MODEL)), 0, 7)[1]


def test_quantization_aware_training_uses_the_weights_that_will_be_stored():
    quant = QuantConfig(names=WEIGHTS, aware=True)
    step = make_program(compress=CompressConfig(quant=quant), optim=ADAGRAD)
    state, losses = train(step, step.init(initial_params(MODEL)), 0, 3)
    evaluated = step.objective.final(state.params)
    stored = dequantize_params(quantize_params(jax.device_get(state.params), quant))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), evaluated, stored)
    assert losses != uncompressed_losses()[:3]


def test_quantization_aware_training_starts_at_the_configured_step():
    quant = QuantConfig(names=WEIGHTS, inputs="dynamic", table_bits=4, aware=True, aware_from=0.5)
    step = make_program(compress=CompressConfig(quant=quant), optim=ADAGRAD, total_steps=10)
    losses, expected = train(step, step.init(initial_params(MODEL)), 0, 7)[1], uncompressed_losses()
    np.testing.assert_allclose(losses[:5], expected[:5], rtol=1e-5)
    assert abs(losses[5] - expected[5]) > 1e-4


@functools.cache
def teacher(width):
    config = SASRecConfig(width=width, ff_width=width, num_layers=1)
    build = functools.partial(SASRec, config, NUM_ITEMS, LENGTH)
    params = init_model(lambda rngs: build(rngs=rngs), seed=5)[1]
    return define_model(lambda rngs: build(rngs=rngs)), jax.device_get(jax.tree.map(lambda x: 3 * x, params))


def test_distillation_gives_the_same_result_on_every_mesh():
    distill = DistillConfig(teachers=("a", "b"), weight=0.7, temperature=2.0, hidden_weight=0.5)
    fields = {"compress": CompressConfig(distill=distill), "optim": ADAGRAD, "num_heads": 4}
    fields["teachers"] = [teacher(12), teacher(6)]
    # The same micro_rows, because the loss averages similarities over the pairs of a micro-batch.
    one_device = make_program(micro_rows=2, **fields)
    sharded = make_program(devices=2, model_axis=4, **fields | SHARDED)
    expected = train(one_device, one_device.init(initial_params(MODEL)), 0, 3)[1]
    losses = train(sharded, sharded.init(initial_params(MODEL)), 0, 3)[1]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_adapters_are_trained_and_the_base_is_frozen():
    lora = CompressConfig(lora=LoraConfig(names=".*(query|up)/kernel", rank=2))
    base = initial_params(MODEL)
    step = make_program(compress=lora, base=base, optim=OptimConfig(type="adam", learning_rate=0.05))
    state = step.init(base)
    first = step.objective.merged(state.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), base)  # adapters start at zero
    state, _ = train(step, state, 0, 3)
    merged = leaf_names(jax.device_get(step.objective.merged(state.params)))
    changed = {name for name, x in leaf_names(base).items() if np.any(merged[name] != x)}
    assert changed == {"blocks/0/attention/query/kernel", "blocks/0/ff/up/kernel"}
    assert sum(x.size for x in jax.tree.leaves(state.params)) == 2 * (8 * 2 + 2 * 8)
    with pytest.raises(ValueError, match="adapts a trained run"):
        make_program(compress=lora)
    with pytest.raises(ValueError, match="shrinks a trained run"):
        make_program(compress=CompressConfig(shrink=ShrinkConfig(heads=1)))


def test_pruning_quantization_and_distillation_together_in_bf16():
    compress = CompressConfig(
        prune=PruneConfig(names=WEIGHTS, share=0.5, end=0.4, num_updates=2),
        quant=QuantConfig(names=WEIGHTS, inputs="dynamic", aware=True, aware_from=0.5),
        distill=DistillConfig(teachers=("a",)),
    )
    precision = PrecisionConfig(compute="bf16", output="f32")
    step = make_program(compress=compress, precision=precision, optim=ADAGRAD, teachers=[teacher(12)])
    state, losses = train(step, step.init(initial_params(MODEL)), 0, 10, num_batches=1)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    stored = quantize_params(jax.device_get(state.params), compress.quant)
    codes = [x for x in jax.tree.leaves(stored) if x.dtype == jnp.int8]
    assert len(codes) == 7  # two tables, five kernels
    assert sum(np.sum(x == 0) for x in codes) >= 0.5 * sum(x.size for x in codes)  # rounding keeps masks


@pytest.mark.parametrize(
    "compress",
    [
        PRUNE,
        CompressConfig(distill=DistillConfig(teachers=("a",))),
        CompressConfig(lora=LoraConfig(names=".*kernel")),
        CompressConfig(quant=QuantConfig(names=WEIGHTS, aware=True)),
    ],
)
def test_sparse_updates_are_refused_with_compression(compress):
    with pytest.raises(ValueError, match="table.optimizer=dense"):
        make_program("sampled", table="rowwise_adagrad", compress=compress, teachers=[teacher(12)], base={})


def test_quantization_aware_training_is_refused_with_tensor_parallelism():
    aware = CompressConfig(quant=QuantConfig(names=WEIGHTS, aware=True))
    with pytest.raises(ValueError, match="mesh.model=2"):
        make_program(model_axis=2, num_heads=2, compress=aware)


def test_a_regex_that_matches_nothing_lists_the_names():
    for compress in (
        CompressConfig(prune=PruneConfig(names="nothing")),
        CompressConfig(quant=QuantConfig(names="nothing", aware=True)),
    ):
        with pytest.raises(ValueError, match="matches no parameter.*items/embedding"):
            step = make_program(compress=compress)
            train(step, step.init(initial_params(MODEL)), 0, 1)
