"""Sampled negatives with exact log-probabilities; weights and biases of a loss by item popularity."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.hashing import Site, mix, words

_SPARE_BIAS = -1e30  # the bias of a spare entry of the table, which has no item yet
_SHARED = 1  # makes the key of shared negatives differ from the keys of rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """Draws item ids in 1..V with known probabilities, by Walker's alias method.

    Source: Walker 1977; Vose 1991. A draw takes one uniform bucket and one coin toss for any distribution.
    """

    accept_V: jax.Array  # f32[V]: probability of keeping the bucket's own item
    alias_V: jax.Array  # int32[V]: the other item of the bucket, counted from 0
    log_prob_V: jax.Array  # f32[V + 1]: log-probability of each item id; -inf for padding (id 0)

    @property
    def num_items(self) -> int:
        return self.alias_V.shape[0]

    def log_prob(self, ids: jax.Array) -> jax.Array:
        return self.log_prob_V[ids]

    def draw(self, key_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """int32[B, *shape] item ids. key_B: uint32[B] from `hashing.row_keys`.

        Probabilities of buckets are exact to a relative V / 2**32, those of coin tosses to 2**-24.
        """
        bucket = _bucket(key_B, shape, self.num_items)
        coin = (words(key_B, Site.NEGATIVE_COIN, shape) >> 8).astype(jnp.float32) * 2.0**-24
        return jnp.where(coin < self.accept_V[bucket], bucket, self.alias_V[bucket]) + 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UniformSampler:
    """A `Sampler` of equal probabilities that needs no arrays."""

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
    """Returns a sampler of negatives.

    kind: "uniform", or "popularity": in proportion to the item's count; an unseen item counts as one event,
    so that every item can be drawn and log-probabilities stay finite. "in_batch" draws from the batch itself
    and uses the log-probabilities of "popularity", because a batch is a sample of the training events.
    item_counts: int[V + 1] training events of each item id (entry 0 unused). num_items: the number of items,
    if the ids above it are spare entries; these are never drawn.
    """
    if kind not in ("uniform", "popularity", "in_batch"):
        raise ValueError(f"sampler={kind!r}: use uniform, popularity or in_batch (LossConfig)")
    if len(item_counts) < 2:
        raise ValueError("the catalogue is empty: there is no item to draw negatives from")
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
    accept[small + large] = 1  # not exactly 1 because of rounding
    return accept, alias


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ItemPrior:
    """Arrays of a loss that depend on item popularity. sampler: draws negatives. weight_V: f32[V + 1], the
    loss weight of each item as a target. bias_V: f32[V + 1], added to the item's score in training. None =
    not used by the loss."""

    sampler: Sampler | UniformSampler
    weight_V: jax.Array | None = None
    bias_V: jax.Array | None = None


def make_prior(config, item_counts: np.ndarray, num_items: int | None = None) -> ItemPrior:
    """Returns the prior that a LossConfig needs.

    item_counts: int[V + 1] training events of each item (entry 0 unused). num_items: the number of items, if
    the ids above it are spare entries of a table that grows; these are never drawn or scored.
    """
    weight_V = bias_V = None
    if num_items is not None:
        bias_V = jnp.where(jnp.arange(len(item_counts)) <= num_items, 0.0, _SPARE_BIAS)
    if config.ips_power:
        weight_V = jnp.asarray(propensity_weights(item_counts, config.ips_power, config.ips_clip))
    if config.popularity_discount:
        discount_V = jnp.asarray(config.popularity_discount * log_popularity(item_counts))
        bias_V = discount_V if bias_V is None else bias_V + discount_V
    sampler = make_sampler(getattr(config, "sampler", "uniform"), item_counts, num_items)
    return ItemPrior(sampler, weight_V, bias_V)


def propensity_weights(item_counts: np.ndarray, power: float, clip: float) -> np.ndarray:
    """f32[V + 1]: (count / largest count)^-power, at most `clip`, divided by its mean over training events.

    With a mean weight of 1, the loss keeps the scale that it has without weights.
    Source: Saito et al., WSDM'20 (arXiv 1909.03601), section 5.1, with power = 0.5; clipping: Gilotte et al.,
    WSDM'18.
    Differs: normalised; the whole loss of a token is weighted, including its negatives, so that positives and
    negatives stay balanced.
    """
    counts_V = _counts(item_counts)
    weights_V = np.minimum((counts_V / counts_V[1:].max()) ** -power, clip)
    mean = np.sum(item_counts[1:] * weights_V[1:]) / max(1, np.sum(item_counts[1:]))
    return (weights_V / (mean or 1.0)).astype(np.float32)


def log_popularity(item_counts: np.ndarray) -> np.ndarray:
    """f32[V + 1]: log(count / mean count) of each item; an unseen item counts as one event. Dividing by the
    mean does not change a softmax, and keeps the initial value of other losses nearly unchanged."""
    counts_V = _counts(item_counts)
    return np.log(counts_V / counts_V[1:].mean()).astype(np.float32)


def _counts(item_counts: np.ndarray) -> np.ndarray:
    return np.maximum(np.asarray(item_counts, np.float64), 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Negatives:
    """Drawn item ids and their log-probabilities, [1, 1, K], [B, 1, K] or [B, S, K].

    local_ids_BSK: the indices of the ids among the entries of the item embedding table that were read.
    """

    ids_BSK: jax.Array
    log_prob_BSK: jax.Array
    local_ids_BSK: jax.Array

    @classmethod
    def of(cls, ids_BSK, sampler) -> "Negatives":
        return cls(ids_BSK, sampler.log_prob(ids_BSK), ids_BSK)


def draw_shared(config, sampler, seed, targets_BS) -> Negatives:
    """Draws negatives that the whole batch shares, [1, 1, K].

    config: a SampledLossConfig. seed: uint32 scalar of this step. targets_BS: the targets of the full batch,
    over all devices and micro-batches.
    """
    key_B, shape = mix(seed, _SHARED)[None], (1, config.num_negatives)
    if config.sampler != "in_batch":
        return Negatives.of(sampler.draw(key_B, shape), sampler)
    flat_T = targets_BS.reshape(-1)
    real_first_T = flat_T[jnp.argsort(flat_T == 0, stable=True)]
    num_real = jnp.maximum(jnp.sum(flat_T > 0), 1).astype(jnp.uint32)
    return Negatives.of(real_first_T[words(key_B, 0, shape) % num_real], sampler)


def draw_by_row(config, sampler, key_B, length: int) -> Negatives:
    """Draws negatives for each row or position. key_B: uint32[B] from `hashing.row_keys`; length: S."""
    shape = (1 if config.sharing == "row" else length, config.num_negatives)
    return Negatives.of(sampler.draw(key_B, shape), sampler)
