"""Layer normalisation. Its handwritten gradient takes fewer passes on a CPU than the automatic one."""

from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.nn.dims import named

EPSILON = 1e-6


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, full_width: int = 0) -> jax.Array:
    """(x - mean) / sqrt(variance + EPSILON) * scale + bias over the last dim; statistics in f32.

    x [..., D]. full_width: the number of dims in mean and variance; those after the first D are zeros; 0 = D.
    Source: Ba, Kiros & Hinton, arXiv 1607.06450.
    """
    return _forward(x, scale_D, bias_D, full_width)[0]


def _mean(x, full_width):
    return jnp.sum(x, axis=-1, keepdims=True) / (full_width or x.shape[-1])


def _forward(x, scale_D, bias_D, full_width):
    x32 = x.astype(jnp.float32)
    mean = _mean(x32, full_width)
    centred = x32 - mean
    variance = _mean(centred**2, full_width)
    if full_width > x.shape[-1]:  # each missing dim is 0, which differs from the mean by `mean`
        variance += (full_width - x.shape[-1]) / full_width * mean**2
    rstd = jax.lax.rsqrt(variance + EPSILON)
    unit = (centred * rstd).astype(x.dtype)
    return unit * scale_D + bias_D, (unit, rstd, scale_D)


def _backward(full_width, residuals, dout):
    """dx = rstd * (d - mean(d) - unit * mean(d * unit)), where d = dout * scale; d is 0 in missing dims."""
    unit, rstd, scale_D = residuals
    tokens = tuple(range(dout.ndim - 1))
    dscale_D = jnp.sum(dout * unit, axis=tokens, dtype=jnp.float32).astype(scale_D.dtype)
    dbias_D = jnp.sum(dout, axis=tokens, dtype=jnp.float32).astype(scale_D.dtype)
    d, unit32 = (dout * scale_D).astype(jnp.float32), unit.astype(jnp.float32)
    dx = rstd * (d - _mean(d, full_width) - unit32 * _mean(d * unit32, full_width))
    return dx.astype(unit.dtype), dscale_D, dbias_D


layer_norm.defvjp(_forward, _backward)


class LayerNorm(nnx.Module):
    def __init__(self, width: int, full_width: int = 0, dim="width", **sizes: int):
        """dim, sizes: the name of the dim and the sizes of its factors, see `nn.dims`."""
        self.full_width = full_width
        self.scale = named(nnx.Param(jnp.ones(width)), dim, **sizes)
        self.bias = named(nnx.Param(jnp.zeros(width)), dim, **sizes)

    def __call__(self, x):
        return layer_norm(x, self.scale[...], self.bias[...], self.full_width)


def unit(x):
    """Returns x [..., D] scaled to length 1; computed in f32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(x32**2, -1, keepdims=True) + 1e-12)).astype(x.dtype)
