"""Random numbers from a counter-based hash: cheap to draw, and cheap to draw again in a backward pass.

A number is a hash of (key of the packed row, site, position in the row). It does not depend on how rows are
grouped into devices or micro-batches, so a step draws the same numbers on every mesh. On a CPU a draw is one
fused loop; Threefry takes hundreds of small operations.
"""

import enum

import jax
import jax.numpy as jnp


@enum.unique
class Site(enum.IntEnum):
    """Identifies the random draws of a step; numbers of two sites are independent. The dropouts of layers use
    the sites between INPUT and MASKED, see `dropout_site`."""

    INPUT = 0  # dropout of a model's input
    MASKED = 1_000  # which items a bidirectional model masks
    MASKED_LAST = 1_001  # in which histories it masks only the last item
    AUGMENT = 2**29  # which augmentation a history gets
    CROP = 2**29 + 1
    REORDER_SPAN = 2**29 + 2
    HIDE = 2**29 + 3
    REORDER = 2**29 + 4
    NEIGHBOUR = 2**29 + 5
    SUBSTITUTE = 2**29 + 6
    NEGATIVE_BUCKET = 2**30
    NEGATIVE_COIN = 2**30 + 1


def dropout_site(layer: int, number: int, count: int) -> int:
    """The site of dropout `number` (1 to `count`) of a layer that has `count` dropouts."""
    site = count * layer + number
    assert 1 <= number <= count and site < Site.MASKED, (layer, number, count)
    return site


def mix(x: jax.Array, key: jax.Array | int = 0) -> jax.Array:
    """Hashes uint32 `x` under uint32 `key` (broadcast). Source: the multiply-xorshift finaliser family of
    Wellons' "hash prospector", with the key added between the rounds."""
    x = jnp.asarray(x, jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = x + jnp.asarray(key, jnp.uint32)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def row_keys(seed: jax.Array, row_ids: jax.Array) -> jax.Array:
    """One uint32 key per packed row: seed uint32 scalar, row_ids int32[B] -> uint32[B]."""
    return mix(mix(row_ids), seed)


def words(key_B: jax.Array, site: int, shape: tuple[int, ...]) -> jax.Array:
    """Random bits, uint32[B, *shape].

    key_B: uint32[B] from `row_keys`. site: a number that differs between the draws of one step.
    """
    counter = jnp.zeros(shape, jnp.uint32)
    for dim, size in enumerate(shape):
        counter = counter * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    key_B = mix(key_B, site + 1).reshape((-1,) + (1,) * len(shape))
    return mix(counter[None] ^ key_B, key_B)
