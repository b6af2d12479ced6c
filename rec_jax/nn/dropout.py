"""Dropout from a counter hash: cheap to draw, cheap to redraw in the backward pass.

A mask bit is a hash of (key of the packed row, position in the row), so it does not depend on how rows
are grouped into devices or micro-batches: one step gives the same masks on every mesh.
"""

from functools import partial

import jax
import jax.numpy as jnp


def mix(x: jax.Array, key: jax.Array | int = 0) -> jax.Array:
    """Hashes uint32 `x` under uint32 `key` (broadcast). Source: the multiply-xorshift finaliser family of
    Wellons' "hash prospector", with the key added between the rounds."""
    x = jnp.asarray(x, jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = x + jnp.asarray(key, jnp.uint32)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def row_keys(seed: jax.Array, row_ids: jax.Array) -> jax.Array:
    """One uint32 key a packed row: seed uint32 scalar, row_ids int32[B] -> uint32[B]."""
    return mix(mix(row_ids), seed)


def _keep_mask(key_B: jax.Array, site: int, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool[shape] for an array whose leading dim is B."""
    counter = jnp.zeros(shape[1:], jnp.uint32)
    for dim in range(len(shape) - 1):
        counter = counter * jnp.uint32(shape[dim + 1]) + jax.lax.broadcasted_iota(jnp.uint32, shape[1:], dim)
    key_B = mix(key_B, site + 1).reshape((-1,) + (1,) * (len(shape) - 1))
    return mix(counter[None] ^ key_B, key_B) >= jnp.uint32(int(rate * 2**32))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dropout(x: jax.Array, key_B: jax.Array, site: int, rate: float) -> jax.Array:
    """Inverted dropout of `x` [B, ...].

    key_B: uint32[B] from `row_keys`; site: a number that differs between the dropouts of one model;
    rate: share of zeros in [0, 1).
    """
    return jnp.where(_keep_mask(key_B, site, rate, x.shape), x * (1 / (1 - rate)), 0).astype(x.dtype)


def _dropout_fwd(x, key_B, site, rate):
    return dropout(x, key_B, site, rate), key_B


def _dropout_bwd(site, rate, key_B, grad):
    return dropout(grad, key_B, site, rate), None


dropout.defvjp(_dropout_fwd, _dropout_bwd)
