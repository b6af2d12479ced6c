"""Fake quantization: the values that training computes with, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quant_runs import ALL, F32, encode, quantized_sasrec, relative_error, sasrec

from rec_jax.compress.quant import QuantConfig, dequantize_params, fake_quantize_params, quantize_params
from rec_jax.nn.quantized import ParamValue
from rec_jax.tree import leaf_names

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "calibration, bits, symmetric, per_tensor",
    [
        ("absmax", 8, True, False),
        ("percentile", 4, False, False),
        ("mse", 8, False, False),
        ("mse", 4, True, True),
    ],
)
def test_fake_quantized_values_are_those_of_the_stored_model(calibration, bits, symmetric, per_tensor):
    params = {"kernel": jnp.asarray(RNG.normal(size=(8, 2, 5)), jnp.float32)}
    params["embedding"] = jnp.asarray(RNG.normal(size=(20, 7)), jnp.float32).at[0].set(0)
    config = QuantConfig(ALL, "float", bits, calibration, 95.0, symmetric, per_tensor)
    faked = jax.jit(lambda p: fake_quantize_params(p, config))(params)
    expected = dequantize_params(quantize_params(params, config))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), faked, expected)


def test_fake_quantization_covers_inputs_once_it_is_on():
    model, params, batch = sasrec()
    config = QuantConfig(ALL, "dynamic")

    @jax.jit
    def fake_encode(params, is_on):
        return model.bind(fake_quantize_params(params, config, is_on))(batch)

    on, off = (np.asarray(fake_encode(params, is_on))[batch.segments > 0] for is_on in (True, False))
    np.testing.assert_allclose(on, encode(quantized_sasrec(config)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(off, encode(params), rtol=1e-5, atol=1e-6)
    assert relative_error(on, off) > 0.002


class StraightThrough(ParamValue):
    """A kernel that rounds its inputs token by token; its gradient is written with stop_gradient instead."""

    def __init__(self, kernel):
        self._kernel_DF, self.shape = kernel.reshape(kernel.shape[0], -1), kernel.shape

    def matmul(self, x_TD):
        scale_T1 = jax.lax.stop_gradient(jnp.max(jnp.abs(x_TD), -1, keepdims=True)) / 127
        return pass_gradient(x_TD, jnp.round(x_TD / scale_T1) * scale_T1) @ self._kernel_DF


def pass_gradient(x, rounded):
    return x + jax.lax.stop_gradient(rounded - x)


def test_gradients_pass_through_the_rounding():
    model, params, batch = sasrec()
    config = QuantConfig(ALL, "dynamic")
    rounded = dequantize_params(quantized_sasrec(config))

    def loss(params):
        return jnp.sum(jnp.sin(model.bind(params)(batch)) * (batch.segments > 0)[..., None])

    def reference(params):
        params = jax.tree.map(pass_gradient, params, rounded)
        leaves = [
            StraightThrough(x) if name.endswith("kernel") else x for name, x in leaf_names(params).items()
        ]
        return loss(jax.tree.unflatten(jax.tree.structure(params), leaves))

    grads = jax.jit(jax.grad(lambda params: loss(fake_quantize_params(params, config))))(params)
    expected = leaf_names(jax.jit(jax.grad(reference))(params))
    for name, grad in leaf_names(grads).items():
        np.testing.assert_allclose(grad, expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
        assert np.any(grad != 0)


def test_clipped_weights_get_no_gradient():
    table = jnp.asarray(RNG.normal(size=(4, 40)), jnp.float32)
    config = QuantConfig(ALL, calibration="percentile", percentile=80.0)
    sum_of_table = jax.jit(
        jax.grad(lambda t: jnp.sum(fake_quantize_params({"embedding": t}, config)["embedding"]))
    )
    grad = sum_of_table(table)
    leaf = quantize_params({"embedding": table}, config)["embedding"]
    limit = 127.5 * np.asarray(leaf.scale_V, F32)[:, None]
    np.testing.assert_array_equal(grad, (np.abs(table) < limit).astype(F32))
    assert 0.75 < grad.mean() < 0.85
