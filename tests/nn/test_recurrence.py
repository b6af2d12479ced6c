"""The linear recurrence against a loop, and its gradient against automatic and numerical ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.nn import recurrence
from rec_jax.nn.recurrence import linear_scan

B, D = 2, 3


def make_run():
    """Returns run(a, x, weight of the outputs) -> (h, da, dx). Each call returns a new function to
    compile."""

    @jax.jit
    def run(a_BSD, x_BSD, weight_BSD):
        h_BSD, pull = jax.vjp(lambda a, x: linear_scan(a, x), a_BSD, x_BSD)
        return h_BSD, *pull(weight_BSD)

    return run


RUNS = {"sequential": make_run(), "associative": make_run()}


@pytest.fixture(params=RUNS)
def run(request, monkeypatch):
    """Runs a test with the sequential scan of CPUs and with the associative scan of other backends."""
    monkeypatch.setattr(recurrence, "_is_cpu", lambda: request.param == "sequential")
    return RUNS[request.param]


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


@functools.cache
def automatic_gradients(length):
    a, x, weight = draw(length)
    return jax.jit(jax.grad(lambda a, x: jnp.sum(slow_jax(a, x) * weight), (0, 1)))(a, x)


def test_runs_use_the_scan_of_their_name(run):
    """Checks that no run was traced with the other scan: only the sequential one has a loop."""
    program = run.lower(*draw(13)).as_text()
    assert ("stablehlo.while" in program) == (run is RUNS["sequential"])


def test_by_hand(run):
    a, x, expected = [9, 0.5, 0, 2], [1, 2, 3, 4], [1, 2.5, 3, 10]
    a_BSD, x_BSD = (np.array(v, np.float32)[None, :, None] for v in (a, x))
    # Gradients of the sum of all h: dx = [1 + .5, 1, 1 + 2, 1], da = dx * [0, 1, 2.5, 3].
    h, da, dx = run(a_BSD, x_BSD, np.ones_like(x_BSD))
    np.testing.assert_array_equal(h[0, :, 0], expected)
    np.testing.assert_array_equal(dx[0, :, 0], [1.5, 1, 3, 1])
    np.testing.assert_array_equal(da[0, :, 0], [0, 1, 7.5, 3])


@pytest.mark.parametrize("length", [1, 2, 13, 32])
def test_equals_the_loop_with_automatic_gradients(run, length):
    a, x, weight = draw(length)
    h, *grads = run(a, x, weight)
    assert h.dtype == jnp.float32
    np.testing.assert_allclose(h, slow(a, x), rtol=1e-5, atol=1e-5)
    for grad, automatic in zip(grads, automatic_gradients(length), strict=True):
        np.testing.assert_allclose(grad, automatic, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 13])
def test_gradients_equal_finite_differences(run, length):
    a, x, weight = draw(length)

    def loss(a, x):
        return np.sum(slow(a, x) * weight)

    step = 1e-5
    da, dx = (np.asarray(grad) for grad in run(a, x, weight)[1:])
    for index in np.ndindex(a.shape):
        bump = np.zeros(a.shape)
        bump[index] = step
        by_a = (loss(a + bump, x) - loss(a - bump, x)) / (2 * step)
        by_x = (loss(a, x + bump) - loss(a, x - bump)) / (2 * step)
        np.testing.assert_allclose([da[index], dx[index]], [by_a, by_x], rtol=1e-4, atol=1e-4)


def test_no_state_or_gradient_crosses_a_reset(run):
    a, x, weight = draw(13)
    a[:, 4] = 0
    changed = x.copy()
    changed[:, :4] += 1
    weight[:, :4] = 0
    h, _, dx = run(a, x, weight)
    np.testing.assert_array_equal(h[:, 4:], run(a, changed, weight)[0][:, 4:])
    np.testing.assert_array_equal(dx[:, :4], 0)
    assert np.all(dx[:, 12] != 0)


def test_bf16_inputs_are_summed_in_f32(run):
    """In bf16, a sum of ones would stop at 256."""
    ones = jnp.ones((1, 300, 1), jnp.bfloat16)
    h = run(ones, ones, ones.astype(jnp.float32))[0]
    np.testing.assert_array_equal(h[0, :, 0], np.arange(1, 301))
