"""Sampled negatives, with exact log-probabilities, and what the popularity of items does to a loss."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.hashing import Site, mix, words

_NEVER = -1e30  # the bias of an entry that stands for no item yet
_SHARED = 1  # sets the key of shared negatives apart from those of rows


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
        coin = (words(key_B, Site.NEGATIVE_COIN, shape) >> 8).astype(jnp.float32) * 2.0**-24
        return jnp.where(coin < self.accept_V[bucket], bucket, self.alias_V[bucket]) + 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UniformSampler:
    """The same for equal probabilities, without arrays."""

    num_items: int = field(metadata={"static": True})

    def log_prob(self, ids: jax.Array) -> jax.Array:
        return jnp.full(ids.shape, -np.log(self.num_items), jnp.float32)

    def draw(self, key_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return _bucket(key_B, shape, self.num_items) + 1


def _bucket(key_B, shape, num_items: int):
    return (words(key_B, Site.NEGATIVE_BUCKET, shape) % jnp.uint32(num_items)).astype(jnp.int32)


def make_sampler(
    kind: str, item_counts: np.ndarray, num_items: int | None = None
) -> Sampler | UniformSampler:
    """item_counts: int[V + 1] training events of each item id (row 0 unused). num_items: those that exist, if
    the ids above it are spare entries, which are never drawn.

    kind: "uniform", or "popularity": in proportion to the count, an unseen item counting as one event so
    that every item can be drawn and log-probabilities stay finite. "in_batch" uses the second's
    log-probabilities (a batch is a draw from the training events) and draws from the batch itself.
    """
    if kind not in ("uniform", "popularity", "in_batch"):
        raise ValueError(f"sampler={kind!r}: use uniform, popularity or in_batch (LossConfig)")
    if len(item_counts) < 2:
        raise ValueError("the catalogue is empty: no item to draw negatives from")
    if kind == "uniform" and num_items is None:
        return UniformSampler(len(item_counts) - 1)
    weights = np.maximum(np.asarray(item_counts[1:], np.float64), 1) ** (kind != "uniform")
    if num_items is not None:
        weights[num_items:] = 0
    probs = weights / weights.sum()
    accept, alias = _alias_table(probs)
    with np.errstate(divide="ignore"):
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ItemPrior:
    """What a loss knows of items before it has seen a batch: a sampler of negatives, and, where the loss asks
    for them, f32[V + 1] the weight of each item as a target and the bias of its score in training."""

    sampler: Sampler | UniformSampler
    weight_V: jax.Array | None = None
    bias_V: jax.Array | None = None


def make_prior(config, item_counts: np.ndarray, num_items: int | None = None) -> ItemPrior:
    """config: a LossConfig. item_counts: int[V + 1] training events of each item (row 0 unused). num_items:
    those that exist, if the ids above it are spare entries of a table that grows: they are never drawn or
    scored.
    """
    weight_V = bias_V = None
    if num_items is not None:
        bias_V = jnp.where(jnp.arange(len(item_counts)) <= num_items, 0.0, _NEVER)
    if config.ips_power:
        weight_V = jnp.asarray(propensity_weights(item_counts, config.ips_power, config.ips_clip))
    if config.popularity_discount:
        discount_V = jnp.asarray(config.popularity_discount * log_popularity(item_counts))
        bias_V = discount_V if bias_V is None else bias_V + discount_V
    sampler = make_sampler(getattr(config, "sampler", "uniform"), item_counts, num_items)
    return ItemPrior(sampler, weight_V, bias_V)


def propensity_weights(item_counts: np.ndarray, power: float, clip: float) -> np.ndarray:
    """f32[V + 1]: (count / largest count)^-power, at most `clip`, over its mean over the training events.

    With a mean of 1 a step stays as large as without weights.
    Source: Saito et al., WSDM'20 (arXiv 1909.03601), section 5.1, with power = 0.5; clipping: Gilotte et al.,
    WSDM'18.
    Differs: normalised; a token's whole loss is weighted, negatives included, so that they stay balanced.
    """
    counts_V = _counts(item_counts)
    weights_V = np.minimum((counts_V / counts_V[1:].max()) ** -power, clip)
    mean = np.sum(item_counts[1:] * weights_V[1:]) / max(1, np.sum(item_counts[1:]))
    return (weights_V / (mean or 1.0)).astype(np.float32)


def log_popularity(item_counts: np.ndarray) -> np.ndarray:
    """f32[V + 1]: log of each item's share of the training events over an even share; an unseen item counts
    as one event. The constant changes no softmax, and leaves other losses where they start."""
    counts_V = _counts(item_counts)
    return np.log(counts_V / counts_V[1:].mean()).astype(np.float32)


def _counts(item_counts: np.ndarray) -> np.ndarray:
    return np.maximum(np.asarray(item_counts, np.float64), 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Negatives:
    """Drawn item ids and their log-probabilities, [1, 1, K], [B, 1, K] or [B, S, K].

    local_ids_BSK: where the ids are among the entries of the item embedding table that were read.
    """

    ids_BSK: jax.Array
    log_prob_BSK: jax.Array
    local_ids_BSK: jax.Array

    @classmethod
    def of(cls, ids_BSK, sampler) -> "Negatives":
        return cls(ids_BSK, sampler.log_prob(ids_BSK), ids_BSK)


def draw_shared(config, sampler, seed, targets_BS) -> Negatives:
    """Negatives that the whole batch shares, [1, 1, K].

    config: a SampledLossConfig. seed: uint32 scalar of this step. targets_BS: of the full batch, over all
    devices and micro-batches.
    """
    key_B, shape = mix(seed, _SHARED)[None], (1, config.num_negatives)
    if config.sampler != "in_batch":
        return Negatives.of(sampler.draw(key_B, shape), sampler)
    flat_T = targets_BS.reshape(-1)
    real_first_T = flat_T[jnp.argsort(flat_T == 0, stable=True)]
    num_real = jnp.maximum(jnp.sum(flat_T > 0), 1).astype(jnp.uint32)
    return Negatives.of(real_first_T[words(key_B, 0, shape) % num_real], sampler)


def draw_by_row(config, sampler, key_B, length: int) -> Negatives:
    """Negatives of each row or position. key_B: uint32[B] from `hashing.row_keys`; length: S."""
    shape = (1 if config.sharing == "row" else length, config.num_negatives)
    return Negatives.of(sampler.draw(key_B, shape), sampler)
