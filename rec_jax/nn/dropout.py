"""Dropout whose masks come from a counter-based hash. The backward pass computes the mask again."""

from functools import partial

import jax
import jax.numpy as jnp

from rec_jax.hashing import words


def _keep_mask(key_B: jax.Array, site: int, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool[shape] for an array whose leading dim is B."""
    return words(key_B, site, shape[1:]) >= jnp.uint32(int(rate * 2**32))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dropout(x: jax.Array, key_B: jax.Array, site: int, rate: float) -> jax.Array:
    """Inverted dropout of `x` [B, ...].

    key_B: uint32[B] from `hashing.row_keys`. site: a number that is different for each dropout of a model.
    rate: the probability of a zero, in [0, 1).
    """
    return jnp.where(_keep_mask(key_B, site, rate, x.shape), x * (1 / (1 - rate)), 0).astype(x.dtype)


def _dropout_fwd(x, key_B, site, rate):
    return dropout(x, key_B, site, rate), key_B


def _dropout_bwd(site, rate, key_B, grad):
    return dropout(grad, key_B, site, rate), None


dropout.defvjp(_dropout_fwd, _dropout_bwd)
