"""Quantized kernels and tables against NumPy, in exact integers if they multiply integers."""

import re

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from rec_jax.nn import quantized as quantized_lib
from rec_jax.nn.dense import dense
from rec_jax.nn.quantized import (
    FakeQuantizedInputs,
    QuantizedKernel,
    QuantizedTable,
    decode,
    encode,
    fake_quantize,
    pack_int4,
    score_items,
    unpack_int4,
)
from rec_jax.tables.embedding import Embedding

RNG = np.random.default_rng(0)
F32 = np.float32
STEP = F32(2**-5)  # the scale of inputs, so that no division by it rounds


def make_kernel(shape, inputs="float", zero=None):
    """Random codes, and scales that bf16 represents exactly; the scale of inputs is STEP."""
    codes = RNG.integers(-127, 128, shape).astype(np.int8)
    scale = jnp.asarray(RNG.uniform(0.01, 0.02, (1, *shape[1:])), jnp.bfloat16)
    static = inputs == "static"
    return QuantizedKernel(
        qwix.QArray(jnp.asarray(codes), scale),
        jnp.full((1, 1), STEP, jnp.bfloat16) if static else None,
        None if zero is None else jnp.full((1, 1), zero, jnp.int8),
        inputs,
    )


def make_inputs(num_tokens, dim, low=-126):
    """Returns (x_TD, codes for scale STEP). Only the largest number of a token is a multiple of STEP."""
    codes = RNG.integers(low, 127, (num_tokens, dim))
    x = (codes + RNG.uniform(-0.4, 0.4, codes.shape)) * STEP
    codes[:, 0], x[:, 0] = 127, 127 * STEP
    return x.astype(F32), codes


def make_table(num_rows, dim, bits=8, symmetric=True):
    """Returns (QuantizedTable, table_VD computed by the definition)."""
    limit = 2 ** (bits - 1) - 1
    codes = RNG.integers(-limit - (not symmetric), limit + 1, (num_rows, dim)).astype(np.int8)
    scale = jnp.asarray(RNG.uniform(0.01, 0.02, num_rows), jnp.bfloat16)
    zero = None if symmetric else RNG.integers(-limit, limit, num_rows).astype(np.int8)
    packed = jnp.asarray(codes) if bits == 8 else pack_int4(jnp.asarray(codes))
    table = QuantizedTable(packed, scale, None if zero is None else jnp.asarray(zero), bits, dim)
    shifted = codes.astype(np.int32) - (0 if zero is None else zero[:, None].astype(np.int32))
    return table, shifted.astype(F32) * np.asarray(scale, F32)[:, None]


def test_codes_by_hand():
    scale = jnp.float32(0.5)
    x = jnp.array([-100.0, -0.74, 0.0, 0.26, 1.0, 63.6])
    np.testing.assert_array_equal(encode(x, scale), [-127, -1, 0, 1, 2, 127])
    np.testing.assert_array_equal(encode(x, scale, bits=4), [-7, -1, 0, 1, 2, 7])
    codes = encode(x, scale, jnp.int8(-3), bits=4)
    np.testing.assert_array_equal(codes, [-8, -4, -3, -2, -1, 7])
    np.testing.assert_array_equal(decode(codes, scale, jnp.int8(-3)), [-2.5, -0.5, 0, 0.5, 1, 5])


def test_packing_by_hand():
    """Byte 0 has dims 0 and 2, byte 1 has dim 1 and padding; the stored number is code + 8."""
    packed = pack_int4(jnp.array([[1, 2, 3]], jnp.int8))
    np.testing.assert_array_equal(packed, [[9 + 16 * 11, 10 + 16 * 8]])
    assert packed.dtype == jnp.uint8


@pytest.mark.parametrize("dim", [1, 7, 16])
def test_unpacking_restores_packed_codes(dim):
    codes = np.resize(np.arange(-8, 8), (5, dim)).astype(np.int8)

    @jax.jit
    def run(codes):
        packed = pack_int4(codes)
        return packed, unpack_int4(packed, dim)

    packed, unpacked = run(codes)
    assert packed.shape == (5, (dim + 1) // 2)
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("shape", [(6, 10), (8, 2, 5)])
def test_float_inputs_multiply_codes(shape):
    kernel = make_kernel(shape)
    x_TD = RNG.normal(size=(7, shape[0])).astype(F32)
    dequantized, y_TF = jax.jit(lambda x_TD, kernel: (kernel.dequantize(), dense(x_TD, kernel)))(x_TD, kernel)
    expected = x_TD.astype(np.float64) @ np.asarray(dequantized, np.float64).reshape(shape[0], -1)
    assert kernel.shape == (shape[0], 10) and dequantized.shape == shape
    np.testing.assert_allclose(y_TF, expected, rtol=1e-5, atol=1e-5)
    assert jax.eval_shape(dense, x_TD.astype(jnp.bfloat16), kernel).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "inputs, shape, num_tokens",
    [
        ("dynamic", (16, 10), 9),
        ("dynamic", (16, 2, 5), 1),
        ("static", (16, 10), 1),
        ("static", (16, 2, 5), 9),
    ],
)
def test_integer_products_equal_numpy(inputs, shape, num_tokens):
    kernel = make_kernel(shape, inputs)
    x_TD, x_codes = make_inputs(num_tokens, shape[0])
    sums = x_codes.astype(np.int32) @ np.asarray(kernel.weight.qvalue, np.int32).reshape(16, 10)
    expected = sums.astype(F32) * STEP * np.asarray(kernel.weight.scale, F32).reshape(1, 10)
    np.testing.assert_array_equal(jax.jit(dense)(x_TD, kernel), expected)


def test_static_inputs_with_a_zero_point():
    """Inputs from -STEP to 254 STEP, others clipped: codes are -128..127, the zero point is -127."""
    kernel = make_kernel((16, 10), "static", zero=-127)
    codes = RNG.integers(-1, 255, (9, 16))
    x_TD = ((codes + RNG.uniform(-0.4, 0.4, codes.shape)) * STEP).astype(F32)
    x_TD[0, 0], codes[0, 0] = 300 * STEP, 254
    x_TD[1, 1], codes[1, 1] = -5 * STEP, -1
    sums = codes @ np.asarray(kernel.weight.qvalue, np.int64)
    expected = sums * np.float64(STEP) * np.asarray(kernel.weight.scale, np.float64)
    np.testing.assert_allclose(jax.jit(dense)(x_TD, kernel), expected, rtol=1e-6, atol=1e-4)


def test_token_of_zeros_gives_zeros():
    kernel = make_kernel((16, 10), "dynamic")
    np.testing.assert_array_equal(jax.jit(dense)(np.zeros((2, 16), F32), kernel), np.zeros((2, 10)))


def dot_types(function, *args):
    """Returns [(type of the result, types of the operands)] of all products in the compiled program."""
    types, dots = {}, []
    for line in jax.jit(function).lower(*args).compile().as_text().splitlines():
        if match := re.match(r"\s*(?:ROOT )?(%[\w.-]+) = (\w+)\[", line):
            types[match[1]] = match[2]
            if operands := re.search(r" dot\((.*?)\)", line):
                dots.append((match[2], [types[name] for name in re.findall(r"%[\w.-]+", operands[1])]))
    return dots


@pytest.mark.parametrize(
    "inputs, zero, expected",
    [
        ("float", None, ("f32", ["f32", "f32"])),
        ("dynamic", None, ("s32", ["s8", "s8"])),
        ("static", None, ("s32", ["s8", "s8"])),
        ("static", 5, ("s32", ["s8", "s8"])),
    ],
)
def test_compiled_product_has_these_types(inputs, zero, expected):
    kernel = make_kernel((128, 64), inputs, zero)
    assert dot_types(dense, jnp.ones((16, 128)), kernel) == [expected]


TABLES = [(8, 6, True), (8, 6, False), (4, 6, True), (4, 7, True), (4, 7, False)]


@pytest.mark.parametrize("bits, dim, symmetric", TABLES)
def test_lookup_and_dequantization(bits, dim, symmetric):
    table, expected = make_table(30, dim, bits, symmetric)
    ids = np.array([[0, 3, 29], [3, 3, 11]])
    assert table.shape == (30, dim)
    dequantized, entries = jax.jit(lambda table, ids: (table.dequantize(), table.look_up(ids)))(table, ids)
    np.testing.assert_array_equal(dequantized, expected)
    np.testing.assert_array_equal(entries, expected[ids])


@pytest.mark.parametrize("symmetric", [True, False])
def test_invalid_ids_read_as_nan(symmetric):
    table, expected = make_table(30, 5, 4, symmetric)
    ids = np.array([2, -1, 30, -30, 2**31 - 1, -(2**31)], np.int32)
    entries = np.asarray(jax.jit(QuantizedTable.look_up)(table, ids))
    assert np.isnan(entries[1:]).all()
    np.testing.assert_array_equal(entries[0], expected[2])


def test_embedding_module_reads_a_quantized_table():
    module = Embedding(30, 6, rngs=nnx.Rngs(0))
    table, expected = make_table(30, 6)
    module.embedding = nnx.Param(table)
    np.testing.assert_array_equal(module(jnp.array([4, 0])), expected[[4, 0]])


# Five slices, of which the last overlaps, and a single one.
@pytest.mark.parametrize(
    "bits, dim, symmetric, slice_rows", [*((*table, 7) for table in TABLES), (*TABLES[-1], 100)]
)
def test_scores_in_f32(bits, dim, symmetric, slice_rows, monkeypatch):
    monkeypatch.setattr(quantized_lib, "_SLICE_ELEMENTS", slice_rows * dim)
    table, expected = make_table(30, dim, bits, symmetric)
    x_BD = RNG.normal(size=(4, dim)).astype(F32)
    scores = jax.jit(lambda x, table: score_items(x, table))(x_BD, table)  # traced again for each slice size
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, x_BD.astype(np.float64) @ expected.T, rtol=1e-4, atol=1e-4)


def test_scores_of_a_plain_table_are_summed_in_f32():
    x_BD, table_VD = np.ones((1, 512)), np.full((2, 512), 1 / 128)
    table_VD[:, 0] = 1
    scores = jax.jit(score_items)(x_BD.astype(jnp.bfloat16), table_VD.astype(jnp.bfloat16))
    np.testing.assert_array_equal(scores, np.full((1, 2), 1 + 511 / 128, F32))


@pytest.mark.parametrize("zero, inside", [(None, [-7, 7]), (2, [-10, 5])])
def test_gradient_is_that_of_clipping(zero, inside):
    """Compares with finite differences of clip(x, low, high), which is fake_quantize without rounding."""
    scale = jnp.float32(0.5)
    # No number is near a clipping limit, where rounding or a finite difference could cross it.
    x = np.array([-6.0, -5.3, -4.1, -3.4, -1.2, 0.1, 2.4, 2.9, 3.1, 4.2], F32)
    weights = RNG.normal(size=x.shape).astype(F32)
    zero = None if zero is None else jnp.int8(zero)

    def surrogate(x):
        return np.sum(np.clip(x, inside[0] * 0.5, inside[1] * 0.5) * np.asarray(weights, np.float64))

    grad = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(fake_quantize(x, scale, zero, 4) * weights)))(x))
    x64 = np.asarray(x, np.float64)
    for i in range(len(x)):
        nudge = np.eye(len(x))[i] * 1e-6
        expected = (surrogate(x64 + nudge) - surrogate(x64 - nudge)) / 2e-6
        np.testing.assert_allclose(grad[i], expected, rtol=1e-5, atol=1e-7)
    assert np.any(grad == 0) and np.any(grad != 0)


def test_fake_quantization_by_hand():
    x = jnp.array([-9.0, -0.74, 0.26, 9.0])
    np.testing.assert_array_equal(fake_quantize(x, jnp.float32(0.5), None, 4), [-3.5, -0.5, 0.5, 3.5])
    np.testing.assert_array_equal(fake_quantize(x, jnp.float32(0.5), jnp.int8(2), 4), [-5, -0.5, 0.5, 2.5])


def test_fake_quantized_inputs_and_their_gradients():
    x_TD, codes = make_inputs(6, 8)
    kernel_DF = RNG.normal(size=(8, 2, 3)).astype(F32)
    weights_TF = RNG.normal(size=(6, 6)).astype(F32)

    def loss(x_TD, kernel_DF, is_on):
        y_TF = dense(x_TD, FakeQuantizedInputs(kernel_DF, is_on))
        return jnp.sum(y_TF * weights_TF), y_TF

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    for is_on, rounded in ((True, codes * STEP), (False, x_TD)):
        assert FakeQuantizedInputs(kernel_DF, is_on).shape == (8, 6)
        (dx, dkernel), y_TF = gradients(x_TD, kernel_DF, is_on)
        np.testing.assert_allclose(y_TF, rounded @ kernel_DF.reshape(8, 6), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, weights_TF @ kernel_DF.reshape(8, 6).T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dkernel.reshape(8, 6), rounded.T @ weights_TF, rtol=1e-5, atol=1e-5)
