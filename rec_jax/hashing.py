"""Random numbers from a counter hash: cheap to draw, cheap to redraw in a backward pass.

A number is a hash of (key of the packed row, site, place in the row), so it does not depend on how rows are
grouped into devices or micro-batches: one step draws the same on every mesh. On a CPU a draw is one fused
loop, where Threefry is hundreds of small operations.
"""

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


def words(key_B: jax.Array, site: int, shape: tuple[int, ...]) -> jax.Array:
    """uint32[B, *shape] of random bits.

    key_B: uint32[B] from `row_keys`; site: a number that differs between the draws of one step.
    """
    counter = jnp.zeros(shape, jnp.uint32)
    for dim, size in enumerate(shape):
        counter = counter * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    key_B = mix(key_B, site + 1).reshape((-1,) + (1,) * len(shape))
    return mix(counter[None] ^ key_B, key_B)
