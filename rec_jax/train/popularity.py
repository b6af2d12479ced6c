"""What the popularity of items does to a loss: weights of targets, and biases that only training sees."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.data.negatives import Sampler, UniformSampler
from rec_jax.train.losses import LossConfig


@dataclass(frozen=True)
class PopularitySampler:
    """A sampler of negatives that also has a weight and a bias for each item; None where there is none."""

    inner: Sampler | UniformSampler
    weight_V: jax.Array | None  # f32[V + 1]
    bias_V: jax.Array | None  # f32[V + 1]

    @property
    def num_items(self) -> int:
        return self.inner.num_items

    def log_prob(self, ids: jax.Array) -> jax.Array:
        return self.inner.log_prob(ids)

    def draw(self, key_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return self.inner.draw(key_B, shape)


def with_popularity(config: LossConfig, sampler, item_counts: np.ndarray):
    """The sampler with what the loss asks for; the very same where it asks for nothing.

    item_counts: int[V + 1] training events of each item (row 0 unused).
    """
    weight_V = bias_V = None
    if config.ips_power:
        weight_V = propensity_weights(item_counts, config.ips_power, config.ips_clip)
    if config.popularity_discount:
        bias_V = config.popularity_discount * log_popularity(item_counts)
    if weight_V is None and bias_V is None:
        return sampler
    return PopularitySampler(sampler, *(None if x is None else jnp.asarray(x) for x in (weight_V, bias_V)))


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
