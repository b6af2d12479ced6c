"""Negative samplers with exact log-probabilities."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.hashing import words

_BUCKET_SITE, _COIN_SITE = 2**30, 2**30 + 1  # far from those of dropouts


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """Draws item ids in 1..V with known probabilities, by Walker's alias method.

    Source: Walker 1977; Vose 1991. One uniform bucket and one coin a draw, whatever the distribution.
    """

    accept_V: jax.Array  # f32[V]: probability of keeping the bucket's own item
    alias_V: jax.Array  # int32[V]: the other item of the bucket, counted from 0
    log_prob_V: jax.Array  # f32[V + 1]: log-probability of each item id; row 0 (padding) is -inf

    @property
    def num_items(self) -> int:
        return self.alias_V.shape[0]

    def log_prob(self, ids: jax.Array) -> jax.Array:
        return self.log_prob_V[ids]

    def draw(self, key_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """int32[B, *shape] item ids, by keys uint32[B] from `hashing.row_keys`.

        A bucket's probability is exact to a relative V / 2**32, a coin's to 2**-24.
        """
        bucket = _bucket(key_B, shape, self.num_items)
        coin = (words(key_B, _COIN_SITE, shape) >> 8).astype(jnp.float32) * 2.0**-24
        return jnp.where(coin < self.accept_V[bucket], bucket, self.alias_V[bucket]) + 1


@dataclass(frozen=True)
class UniformSampler:
    """The same for equal probabilities, without arrays."""

    num_items: int

    def log_prob(self, ids: jax.Array) -> jax.Array:
        return jnp.full(ids.shape, -np.log(self.num_items), jnp.float32)

    def draw(self, key_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return _bucket(key_B, shape, self.num_items) + 1


def _bucket(key_B, shape, num_items: int):
    return (words(key_B, _BUCKET_SITE, shape) % jnp.uint32(num_items)).astype(jnp.int32)


def make_sampler(kind: str, item_counts: np.ndarray) -> Sampler | UniformSampler:
    """item_counts: int[V + 1] training events of each item id (row 0 unused).

    kind: "uniform", or "popularity": in proportion to the count, an unseen item counting as one event so
    that every item can be drawn and log-probabilities stay finite. "in_batch" uses the second's
    log-probabilities (a batch is a draw from the training events) and draws from the batch itself.
    """
    if kind not in ("uniform", "popularity", "in_batch"):
        raise ValueError(f"sampler={kind!r}: use uniform, popularity or in_batch (LossConfig)")
    if len(item_counts) < 2:
        raise ValueError("the catalogue is empty: no item to draw negatives from")
    if kind == "uniform":
        return UniformSampler(len(item_counts) - 1)
    weights = np.maximum(np.asarray(item_counts[1:], np.float64), 1)
    probs = weights / weights.sum()
    accept, alias = _alias_table(probs)
    log_prob = np.concatenate([[-np.inf], np.log(probs)])
    return Sampler(
        jnp.asarray(accept, jnp.float32), jnp.asarray(alias, jnp.int32), jnp.asarray(log_prob, jnp.float32)
    )


def _alias_table(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    num = probs.size
    accept, alias = probs * num, np.arange(num)
    small = list(np.flatnonzero(accept < 1)[::-1])
    large = list(np.flatnonzero(accept >= 1)[::-1])
    while small and large:
        low, high = small.pop(), large[-1]
        alias[low] = high
        accept[high] -= 1 - accept[low]
        if accept[high] < 1:
            small.append(large.pop())
    accept[small + large] = 1  # what rounding left over
    return accept, alias
