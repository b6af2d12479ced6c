"""Random numbers from a counter hash: cheap to draw, cheap to redraw in a backward pass.

A number is a hash of (key of the packed row, site, place in the row), so it does not depend on how rows are
grouped into devices or micro-batches: one step draws the same on every mesh. On a CPU a draw is one fused
loop, where Threefry is hundreds of small operations.
"""

import enum

import jax
import jax.numpy as jnp


@enum.unique
class Site(enum.IntEnum):
    """The draws of a step for its rows: numbers of two sites are independent. Dropouts of layers have the
    sites between INPUT and MASKED, see `dropout_site`."""

    INPUT = 0  # dropout of a model's input
    MASKED = 1_000  # which items a model that sees both sides masks
    MASKED_LAST = 1_001  # in which histories it masks the last alone
    AUGMENT = 2**29  # the change that a history gets
    CROP = 2**29 + 1
    REORDER_SPAN = 2**29 + 2
    HIDE = 2**29 + 3
    REORDER = 2**29 + 4
    NEIGHBOUR = 2**29 + 5
    SUBSTITUTE = 2**29 + 6
    NEGATIVE_BUCKET = 2**30
    NEGATIVE_COIN = 2**30 + 1


def dropout_site(layer: int, place: int, places: int) -> int:
    """Of the dropout `place` = 1..`places` of a layer."""
    site = places * layer + place
    assert 1 <= place <= places and site < Site.MASKED, (layer, place, places)
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
