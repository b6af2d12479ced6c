"""Quantized parameters: error bounds, calibration against NumPy, whole models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_runs import ALL, F32, encode, quantized_sasrec, relative_error, samples, sasrec

from rec_jax.compress import quant as quant_lib
from rec_jax.compress.quant import (
    QuantConfig,
    dequantize_params,
    is_quantized,
    memory_bytes,
    pack_leaf,
    quantize_params,
    unpack_leaf,
)
from rec_jax.models.base import define_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.nn.quantized import QuantizedKernel, QuantizedTable
from rec_jax.tree import leaf_names

RNG = np.random.default_rng(0)
CALIBRATIONS = ["absmax", "percentile", "mse"]


def quantize(name, array, **kwargs):
    """Quantizes one parameter. kwargs: fields of QuantConfig, and `samples` of its inputs."""
    samples = kwargs.pop("samples", None)
    samples = None if samples is None else {name: samples}
    return quantize_params({name: jnp.asarray(array, jnp.float32)}, QuantConfig(ALL, **kwargs), samples)[name]


def read(leaf):
    return np.asarray(leaf.dequantize())


def as_channels(name, array):
    """A matrix with one row for each scale: an output channel of a kernel, an entry of a table."""
    return array if name == "embedding" else array.reshape(array.shape[0], -1).T


def scales_of(leaf):
    scale = leaf.scale_V if isinstance(leaf, QuantizedTable) else leaf.weight.scale
    assert scale.dtype == jnp.bfloat16
    return np.asarray(scale, F32).reshape(-1, 1)


def bf16_up(x):
    """The smallest bf16 number that is at least x, for x > 0."""
    bf16 = np.asarray(x, jnp.bfloat16)
    above = (bf16.view(np.uint16) + np.uint16(1)).view(jnp.bfloat16)
    return np.where(bf16.astype(F32) < x, above, bf16).astype(F32)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize(
    "name, shape, bits, symmetric",
    [
        ("kernel", (15, 30), 8, True),  # all have 30 scales, of 15 numbers each: few programs to compile
        ("kernel", (15, 2, 15), 8, True),
        ("embedding", (30, 15), 8, True),
        ("embedding", (30, 15), 8, False),
        ("embedding", (30, 15), 4, True),
        ("embedding", (30, 15), 4, False),
    ],
)
def test_errors_are_at_most_half_a_step(name, shape, bits, symmetric, per_tensor):
    array = (RNG.normal(size=shape) + 0.5).astype(F32)
    leaf = quantize(name, array, table_bits=bits, symmetric=symmetric, per_tensor=per_tensor)
    rows, scales = as_channels(name, array), scales_of(leaf)
    error = np.abs(as_channels(name, read(leaf)) - rows)
    assert np.all(error <= scales * (0.5 + 1e-4)) and error.max() > 0.3 * scales.max()
    if per_tensor:
        rows = rows.reshape(1, -1)
    low, high = np.minimum(rows.min(-1), 0), np.maximum(rows.max(-1), 0)
    exact = np.abs(rows).max(-1) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    np.testing.assert_array_equal(scales, np.broadcast_to(bf16_up(exact.astype(F32)), len(scales))[:, None])


@pytest.mark.parametrize("name", ["kernel", "embedding"])
def test_percentile_scales_equal_numpy(name):
    array = RNG.normal(size=(40, 50)).astype(F32)
    scales = scales_of(quantize(name, array, calibration="percentile", percentile=90.0))
    high = np.quantile(np.abs(as_channels(name, array)), 0.9, axis=1).astype(F32)
    np.testing.assert_allclose(scales[:, 0], high / 127, rtol=2**-7)
    assert np.all(scales[:, 0] >= high / 127 * (1 - 1e-6))


def test_asymmetric_percentile_ranges_equal_numpy():
    table = RNG.normal(size=(40, 50)).astype(F32) + 0.3
    leaf = quantize("embedding", table, calibration="percentile", percentile=90.0, symmetric=False)
    low, high = np.quantile(table, [0.1, 0.9], axis=1)
    np.testing.assert_allclose(scales_of(leaf)[:, 0], (high - low) / 255, rtol=2**-7)
    # Rounding extends the range: that of the scale by up to 2 steps, that of the zero point by half a step.
    few_steps = 2.5 * scales_of(leaf).max() + 1e-6
    np.testing.assert_allclose(read(leaf).min(1), low, rtol=0, atol=few_steps)
    np.testing.assert_allclose(read(leaf).max(1), high, rtol=0, atol=few_steps)


@pytest.mark.parametrize(
    "name, shape, bits, symmetric",
    [
        ("kernel", (9000, 3), 8, True),
        ("embedding", (3, 9000), 8, True),
        ("embedding", (60, 60), 4, True),
        ("embedding", (60, 60), 4, False),
    ],
)
def test_mse_calibration_finds_the_best_of_20_ranges(name, shape, bits, symmetric):
    """Compares with brute force. The numbers have heavy tails, so that the full range is not the best."""
    array = RNG.standard_t(3, size=shape).astype(F32)
    rows, half = as_channels(name, array), 2 ** (bits - 1)
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    if symmetric:
        high = np.maximum(-low, high)
    errors = []
    for factor in 1 - 0.04 * np.arange(20):
        span, steps = (high, half - 1) if symmetric else (high - low, 2 * half - 1)
        scale = bf16_up((factor * span / steps).astype(F32))
        zero = 0 if symmetric else -half - np.round(factor * low / scale)
        codes = np.clip(np.round(rows / scale) + zero, -half + symmetric, half - 1)
        errors.append(np.sum(((codes - zero) * scale - rows) ** 2, 1))

    def error(calibration):
        leaf = quantize(name, array, table_bits=bits, calibration=calibration, symmetric=symmetric)
        return np.sum((as_channels(name, read(leaf)) - rows) ** 2, 1)

    np.testing.assert_allclose(error("mse"), np.min(errors, 0), rtol=1e-3)
    assert np.all(error("mse") <= error("absmax") * (1 + 1e-6))
    assert np.sum(error("mse")) < np.sum(error("absmax"))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_zero_point_reduces_errors_if_all_numbers_have_the_same_sign(bits):
    table = RNG.uniform(0, 1, (50, 32)).astype(F32)
    error = {
        symmetric: np.sum(
            (read(quantize("embedding", table, table_bits=bits, symmetric=symmetric)) - table) ** 2
        )
        for symmetric in (True, False)
    }
    assert error[False] < 0.35 * error[True]  # half the step, so a quarter of the squared error


@pytest.mark.parametrize("name, symmetric", [("kernel", True), ("embedding", True), ("embedding", False)])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_zeros_stay_zeros(name, calibration, symmetric):
    options = {"calibration": calibration, "symmetric": symmetric, "table_bits": 4}
    array = RNG.normal(size=(8, 8)).astype(F32)
    as_channels(name, array)[3] = 0
    rows = as_channels(name, read(quantize(name, array, **options)))
    np.testing.assert_array_equal(rows[3], np.zeros(8))
    assert np.isfinite(rows).all() and np.all(np.any(rows[[0, 7]] != 0, axis=1))
    assert not read(quantize(name, np.zeros((8, 8)), **options)).any()


@pytest.mark.parametrize(
    "bits, symmetric, per_tensor", [(8, True, False), (4, False, False), (4, False, True)]
)
def test_quantizing_in_slices_gives_the_same_table(bits, symmetric, per_tensor, monkeypatch):
    table = RNG.normal(size=(50, 8)).astype(F32)
    options = {"table_bits": bits, "symmetric": symmetric, "per_tensor": per_tensor}
    whole = quantize("embedding", table, **options)
    monkeypatch.setattr(quant_lib, "_SLICE_ELEMENTS", 12 * 8)
    jax.tree.map(np.testing.assert_array_equal, quantize("embedding", table, **options), whole)


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_input_scales_cover_the_range_of_the_samples(symmetric):
    samples = RNG.uniform(-1, 3, (20, 6)).astype(F32)
    samples[3, 2], samples[4, 1] = -1, 3
    leaf = quantize("kernel", np.eye(6), inputs="static", symmetric=symmetric, samples=samples)
    expected = F32(3 / 127) if symmetric else F32(4 / 255)
    np.testing.assert_array_equal(np.asarray(leaf.input_scale, F32), [[bf16_up(expected)]])
    assert (leaf.input_zero is None) == symmetric
    x_TD = np.array(
        [[-1, 0, 0.5, 1, 2, 3]], F32
    )  # the kernel is the identity: the outputs are the quantized inputs
    step = float(leaf.input_scale[0, 0]) + 2 * float(leaf.weight.scale[0, 0])
    np.testing.assert_allclose(leaf.matmul(jnp.asarray(x_TD)), x_TD, atol=step)


@pytest.mark.parametrize(
    "options, bound",
    [
        ({"table_bits": 4}, 0.15),
        ({"inputs": "dynamic"}, 0.03),
        ({"inputs": "static"}, 0.03),  # test_all_models.py: with a zero point
    ],
)
def test_a_quantized_model_is_close_to_the_float_model(options, bound):
    _, params, _ = sasrec()
    quantized = quantized_sasrec(QuantConfig(ALL, **options))
    error = relative_error(encode(quantized), encode(params))
    assert bound / 10 < error < bound  # not 0: the parameters are quantized
    if quantized["blocks"][0]["ff"]["up"]["kernel"].inputs == "float":
        plain = dequantize_params(quantized)
        assert jax.tree.map(np.shape, plain) == jax.tree.map(np.shape, params)
        np.testing.assert_allclose(encode(quantized), encode(plain), rtol=1e-4, atol=1e-5)


def test_only_matched_parameters_are_quantized():
    _, params, _ = sasrec()
    quantized = quantize_params(params, QuantConfig(r"items/embedding|.*up/kernel"))
    assert isinstance(quantized["items"]["embedding"], QuantizedTable)
    assert isinstance(quantized["blocks"][0]["ff"]["up"]["kernel"], QuantizedKernel)
    leaves = jax.tree.leaves(quantized, is_leaf=is_quantized)
    assert sum(map(is_quantized, leaves)) == 2
    assert quantized["blocks"][0]["ff"]["down"]["kernel"] is params["blocks"][0]["ff"]["down"]["kernel"]
    assert quantize_params(params, QuantConfig()) is params


def test_a_model_of_width_128_takes_3_8_times_less_memory():
    config = SASRecConfig(width=128, ff_width=128, num_layers=1)
    model = define_model(lambda rngs: SASRec(config, 3000, 50, rngs=rngs))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), model.abstract_params)
    quantized = quantize_params(params, QuantConfig(ALL))
    assert memory_bytes(params) >= 3.8 * memory_bytes(quantized)
    expected = sum(4 * x.size for x in jax.tree.leaves(params))
    assert memory_bytes(params) == expected
    assert memory_bytes(quantized["items"]) == 3001 * (128 + 2)
    int4 = quantize_params(params, QuantConfig(r"items/embedding", table_bits=4))
    assert memory_bytes(int4["items"]) == 3001 * (64 + 2)


def test_observed_inputs_are_those_of_real_tokens():
    _, params, batch = sasrec()
    assert set(samples()) == {name for name in leaf_names(params) if name.endswith("kernel")}
    is_real = batch.segments > 0
    x_TD = np.asarray(params["items"]["embedding"], np.float64)[batch.items[is_real]] * 4
    x_TD += params["positions"]["embedding"][batch.positions[is_real]]
    x_TD -= x_TD.mean(-1, keepdims=True)
    x_TD /= np.sqrt((x_TD**2).mean(-1, keepdims=True) + 1e-6)
    norm = params["blocks"][0]["attention_norm"]
    expected = x_TD * norm["scale"] + norm["bias"]
    for name in ("query", "key_value"):
        inputs = samples()[f"blocks/0/attention/{name}/kernel"]
        np.testing.assert_allclose(inputs, np.concatenate([expected, expected]), rtol=1e-4, atol=1e-5)
    assert samples()["blocks/0/ff/down/kernel"].shape == (2 * is_real.sum(), 24)


@pytest.mark.parametrize(
    "options",
    [
        {"table_bits": 4},
        {"inputs": "static"},
        {"inputs": "static", "symmetric": False, "table_bits": 4},
    ],
)
def test_packed_leaves_are_unpacked_unchanged(options):
    quantized = quantized_sasrec(QuantConfig(ALL, **options))
    for leaf in jax.tree.leaves(quantized, is_leaf=is_quantized):
        kind, parts, meta = pack_leaf(leaf)
        unpacked = unpack_leaf(kind, parts, json.loads(json.dumps(meta)))
        assert jax.tree.structure(unpacked) == jax.tree.structure(leaf)
        jax.tree.map(np.testing.assert_array_equal, unpacked, leaf)
        assert sum(part.nbytes for part in parts.values()) == memory_bytes(leaf)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"names": "nothing"}, r"compress\.quant\.names='nothing' matches no parameter.*items/embedding"),
        ({"names": ".*"}, r"matches blocks/0/attention/key_value/bias, which is neither"),
        (
            {"names": ALL, "inputs": "static"},
            r"no samples of the inputs of blocks/0/attention/key_value/kernel",
        ),
    ],
)
def test_names_that_cannot_be_quantized_are_refused(options, message):
    _, params, _ = sasrec()
    with pytest.raises(ValueError, match=message):
        quantize_params(params, QuantConfig(**options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"percentile": 50.0}, "percentile=50.0"),
        ({"percentile": 100.1}, "percentile=100.1"),
        ({"names": ALL, "aware": True, "aware_from": 1.0}, "aware_from=1.0"),
        ({"aware": True}, "names is empty"),
    ],
)
def test_invalid_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig(**options)
