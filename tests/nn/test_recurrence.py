"""The linear recurrence against a loop, and its gradient against automatic and numerical ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.nn import recurrence
from rec_jax.nn.recurrence import linear_scan

B, D = 2, 3


@pytest.fixture(params=["token by token", "associative"])
def path(request, monkeypatch):
    """Runs a test with the sequential scan of CPUs and with the associative scan of other backends."""
    monkeypatch.setattr(recurrence, "_is_cpu", lambda: request.param == "token by token")
    jax.clear_caches()  # they hold the other path


def slow(a_BSD, x_BSD):
    a_BSD, x_BSD = np.asarray(a_BSD, np.float64), np.asarray(x_BSD, np.float64)
    h_BSD, h_BD = np.zeros_like(x_BSD), 0.0
    for t in range(x_BSD.shape[1]):
        h_BD = a_BSD[:, t] * h_BD + x_BSD[:, t]
        h_BSD[:, t] = h_BD
    return h_BSD


def slow_jax(a_BSD, x_BSD):
    """The loop in JAX, for automatic differentiation."""
    outs, h_BD = [], 0.0
    for t in range(x_BSD.shape[1]):
        h_BD = a_BSD[:, t] * h_BD + x_BSD[:, t]
        outs.append(h_BD)
    return jnp.stack(outs, axis=1)


def draw(length, seed=0):
    """Returns (a, x, weights of the outputs). a has zeros, ones, negative numbers, and numbers above 1."""
    rng = np.random.default_rng(seed)
    a, x, weight = rng.normal(size=(3, B, length, D)).astype(np.float32)
    a[rng.random(a.shape) < 0.2] = 0
    a[rng.random(a.shape) < 0.2] = 1
    return a, x, weight


def test_by_hand(path):
    a, x, expected = [9, 0.5, 0, 2], [1, 2, 3, 4], [1, 2.5, 3, 10]
    a_BSD, x_BSD = (jnp.array(v, jnp.float32)[None, :, None] for v in (a, x))
    np.testing.assert_array_equal(jax.jit(linear_scan)(a_BSD, x_BSD)[0, :, 0], expected)
    # Gradients of the sum of all h: dx = [1 + .5, 1, 1 + 2, 1], da = dx * [0, 1, 2.5, 3].
    da, dx = jax.jit(jax.grad(lambda a, x: jnp.sum(linear_scan(a, x)), (0, 1)))(a_BSD, x_BSD)
    np.testing.assert_array_equal(dx[0, :, 0], [1.5, 1, 3, 1])
    np.testing.assert_array_equal(da[0, :, 0], [0, 1, 7.5, 3])


@pytest.mark.parametrize("length", [1, 2, 13, 32])
def test_equals_the_loop(path, length):
    a, x, _ = draw(length)
    out = jax.jit(linear_scan)(a, x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, slow(a, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 13])
def test_gradients_equal_automatic_ones_and_finite_differences(path, length):
    a, x, weight = draw(length)

    def gradients(scan):
        return jax.jit(jax.grad(lambda a, x: jnp.sum(scan(a, x) * weight), (0, 1)))(a, x)

    ours = gradients(linear_scan)
    for grad, automatic in zip(ours, gradients(slow_jax), strict=True):
        np.testing.assert_allclose(grad, automatic, rtol=1e-5, atol=1e-5)

    def loss(a, x):
        return np.sum(slow(a, x) * weight)

    step = 1e-5
    da, dx = (np.asarray(g) for g in ours)
    for index in np.ndindex(a.shape):
        bump = np.zeros(a.shape)
        bump[index] = step
        by_a = (loss(a + bump, x) - loss(a - bump, x)) / (2 * step)
        by_x = (loss(a, x + bump) - loss(a, x - bump)) / (2 * step)
        np.testing.assert_allclose([da[index], dx[index]], [by_a, by_x], rtol=1e-4, atol=1e-4)


def test_no_state_or_gradient_crosses_a_reset(path):
    a, x, weight = draw(8)
    a[:, 4] = 0
    changed = x.copy()
    changed[:, :4] += 1
    weight[:, :4] = 0

    @jax.jit
    def run(x):
        h, pull = jax.vjp(lambda x: linear_scan(a, x), x)
        return h, *pull(weight)

    h, dx = run(x)
    np.testing.assert_array_equal(h[:, 4:], run(changed)[0][:, 4:])
    np.testing.assert_array_equal(dx[:, :4], 0)
    assert np.all(dx[:, 7] != 0)


def test_bf16_inputs_are_summed_in_f32(path):
    """In bf16, a sum of ones would stop at 256."""
    ones = jnp.ones((1, 300, 1), jnp.bfloat16)
    out = jax.jit(linear_scan)(ones, ones)
    np.testing.assert_array_equal(out[0, :, 0], np.arange(1, 301))
