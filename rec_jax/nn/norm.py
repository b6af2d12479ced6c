"""Layer normalisation with its own gradient: fewer passes on a CPU than the automatic one takes."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

EPSILON = 1e-6


@jax.custom_vjp
def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + EPSILON) * scale + bias over the last dim; statistics in f32.

    x [..., D]. Source: Ba, Kiros & Hinton, arXiv 1607.06450.
    """
    return _forward(x, scale_D, bias_D)[0]


def _mean(x):
    return jnp.mean(x, axis=-1, keepdims=True)


def _forward(x, scale_D, bias_D):
    x32 = x.astype(jnp.float32)
    centred = x32 - _mean(x32)
    rstd = jax.lax.rsqrt(_mean(centred**2) + EPSILON)
    unit = (centred * rstd).astype(x.dtype)
    return unit * scale_D + bias_D, (unit, rstd, scale_D)


def _backward(residuals, dout):
    """d = dout * scale goes back less its mean and less its projection on the normalised input."""
    unit, rstd, scale_D = residuals
    tokens = tuple(range(dout.ndim - 1))
    dscale_D = jnp.sum(dout * unit, axis=tokens, dtype=jnp.float32).astype(scale_D.dtype)
    dbias_D = jnp.sum(dout, axis=tokens, dtype=jnp.float32).astype(scale_D.dtype)
    d, unit32 = (dout * scale_D).astype(jnp.float32), unit.astype(jnp.float32)
    dx = rstd * (d - _mean(d) - unit32 * _mean(d * unit32))
    return dx.astype(unit.dtype), dscale_D, dbias_D


layer_norm.defvjp(_forward, _backward)


class LayerNorm(nnx.Module):
    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x):
        return layer_norm(x, self.scale[...], self.bias[...])
