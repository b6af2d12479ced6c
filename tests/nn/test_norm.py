"""Layer normalisation against the formula in NumPy, and its gradient against the automatic one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.nn import norm
from rec_jax.nn.norm import EPSILON

layer_norm = jax.jit(norm.layer_norm, static_argnums=3)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(3, 2, (4, 5, 7)), jnp.float32)
SCALE, BIAS = (jnp.asarray(RNG.normal(size=7), jnp.float32) for _ in range(2))


def reference(x, scale, bias, full_width=7):
    """Pads x with zeros for the missing dims, normalises, and removes these dims again."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, full_width - 7)))
    mean = x.mean(-1, keepdims=True)
    unit = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + EPSILON)
    return unit[..., :7] * scale + bias


def test_equals_the_formula_in_numpy():
    x = np.asarray(X, np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON) * SCALE + BIAS
    np.testing.assert_allclose(layer_norm(X, SCALE, BIAS), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("full_width", [7, 8, 20])
def test_values_and_gradients_equal_the_formula(full_width):
    weight = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)

    def run(function):
        out, pull = jax.vjp(lambda *args: function(*args, full_width), X, SCALE, BIAS)
        return out, pull(weight)

    (out, grads), (expected, automatic) = (jax.jit(run, static_argnums=0)(f) for f in (layer_norm, reference))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, automatic, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_variance_is_accurate_with_a_large_mean(offset):
    out = layer_norm(X + offset, jnp.ones(7), jnp.zeros(7))
    np.testing.assert_allclose(np.asarray(out).std(-1), 1, rtol=1e-3)


def test_constant_input_gives_the_bias():
    np.testing.assert_allclose(layer_norm(jnp.full((2, 7), 5.0), SCALE, BIAS), [BIAS, BIAS], rtol=1e-6)


def test_missing_dims_by_hand():
    """(3, 1, 0, 0) has mean 1 and variance 6 / 4."""
    out = layer_norm(jnp.array([3.0, 1.0]), jnp.ones(2), jnp.zeros(2), 4)
    np.testing.assert_allclose(out, [2 / 1.5**0.5, 0], rtol=1e-5)


def test_full_width_equal_to_the_width_changes_no_bit():
    np.testing.assert_array_equal(layer_norm(X, SCALE, BIAS, 7), layer_norm(X, SCALE, BIAS))


def test_bf16_stays_bf16():
    args = [a.astype(jnp.bfloat16) for a in (X, SCALE, BIAS)]
    out = layer_norm(*args)
    grads = jax.eval_shape(jax.grad(lambda *args: jnp.sum(layer_norm(*args)), (0, 1, 2)), *args)
    assert out.dtype == jnp.bfloat16 and {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(out.astype(jnp.float32), reference(X, SCALE, BIAS), atol=0.05)
