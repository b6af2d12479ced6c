"""A linear recurrence along packed rows, with a handwritten gradient."""

import jax
import jax.numpy as jnp

from rec_jax.nn.context import Context


def linear_scan(a_BSD: jax.Array, x_BSD: jax.Array) -> jax.Array:
    """Returns h_t = a_t * h_{t-1} + x_t along S, element by element, from h = 0.

    h is f32[B, S, D], computed in f32. a = 0 resets the state, as is needed at the first token of a segment.

    The work is linear in S. On a CPU the scan is sequential, which is faster there than an associative scan,
    whole or in chunks, for all S from 200 to 8,192, and compiles faster. Other backends, where S sequential
    steps are slow, use an associative scan of about 2 log2(S) steps.
    """
    return _linear_scan(a_BSD.astype(jnp.float32), x_BSD.astype(jnp.float32))


@jax.custom_vjp
def _linear_scan(a_BSD, x_BSD):
    return _scan(a_BSD, x_BSD)


def _forward(a_BSD, x_BSD):
    h_BSD = _scan(a_BSD, x_BSD)
    return h_BSD, (a_BSD, h_BSD)


def _backward(residuals, dh_BSD):
    """dx_t = dh_t + a_{t+1} * dx_{t+1}, the same recurrence in reverse; da_t = dx_t * h_{t-1}."""
    a_BSD, h_BSD = residuals
    next_a = jnp.pad(a_BSD[:, 1:], ((0, 0), (0, 1), (0, 0)))
    last_h = jnp.pad(h_BSD[:, :-1], ((0, 0), (1, 0), (0, 0)))
    dx_BSD = _scan(next_a, dh_BSD, reverse=True)
    return dx_BSD * last_h, dx_BSD


_linear_scan.defvjp(_forward, _backward)


def _scan(a_BSD, x_BSD, reverse: bool = False):
    if not _is_cpu():
        return jax.lax.associative_scan(_compose, (a_BSD, x_BSD), reverse=reverse, axis=1)[1]

    def step(h_BD, token):
        a_BD, x_BD = token
        h_BD = a_BD * h_BD + x_BD
        return h_BD, h_BD

    a_SBD, x_SBD = a_BSD.swapaxes(0, 1), x_BSD.swapaxes(0, 1)
    _, h_SBD = jax.lax.scan(step, jnp.zeros_like(x_SBD[0]), (a_SBD, x_SBD), reverse=reverse)
    return h_SBD.swapaxes(0, 1)


def _compose(first, second):
    """Composes two updates h -> a * h + x: the first, then the second."""
    (a, x), (b, y) = first, second
    return a * b, b * x + y


class LinearRecurrence:
    """The mixer (`nn.context`) that computes `linear_scan`. Its suffix is the states [N, K, D]."""

    def __call__(self, a_BSD, x_BSD, ctx: Context):
        return linear_scan(a_BSD, x_BSD)

    def prefill(self, a_BSD, x_BSD, ctx: Context, query_positions):
        h_BSD = linear_scan(a_BSD, x_BSD)
        return h_BSD, None, h_BSD[query_positions][:, None]

    def step(self, a_BKD, x_BKD, prefix, suffix, ctx: Context):
        h_BKD = a_BKD * suffix + x_BKD
        return h_BKD, h_BKD


def _is_cpu() -> bool:
    return jax.default_backend() == "cpu"
