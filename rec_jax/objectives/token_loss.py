"""Losses of tokens with a target. `loss.type` selects one; each has its own config keys.

A token loss takes the query vectors of a micro-batch, the item vectors and the targets, and returns a sum
over real tokens, so that sums over micro-batches and devices equal the loss of the full batch.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from rec_jax.data.batch import Batch
from rec_jax.objectives.catalogue import Catalogue
from rec_jax.objectives.negatives import ItemPrior, Negatives

_DROPPED = -1e30  # the score of a negative that is left out


@dataclass(frozen=True, kw_only=True)
class TokenLossConfig:
    """Keys of every loss.

    ips_power: the weight of a target is its number of training events to the power -ips_power, at most
    ips_clip times the weight of the most frequent item; 0 = equal weights. popularity_discount: this number
    times the log-popularity is added to scores, in training only; above 0 it favours the long tail.
    matryoshka: sizes of vector prefixes; the loss is the mean over these prefixes and the full vectors.
    future_weight: the weight of each head of model.num_future except the first.
    """

    ips_power: float = 0.0
    ips_clip: float = 100.0
    popularity_discount: float = 0.0
    matryoshka: tuple[int, ...] = ()
    future_weight: float = 1.0

    def __post_init__(self):
        name = type(self).__name__
        if self.ips_power < 0:
            raise ValueError(f"ips_power={self.ips_power} must be 0 (off) or more ({name})")
        if list(self.matryoshka) != sorted({dims for dims in self.matryoshka if dims > 0}):
            raise ValueError(f"matryoshka={self.matryoshka} must be positive and increase ({name})")
        if self.future_weight < 0:
            raise ValueError(f"future_weight={self.future_weight} must not be negative ({name})")
        if self.ips_clip < 1:
            raise ValueError(f"ips_clip={self.ips_clip} must be at least 1 ({name})")


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(TokenLossConfig):
    """The exact cross-entropy over the whole catalogue."""

    type: Literal["softmax"] = "softmax"


@dataclass(frozen=True, kw_only=True)
class SampledLossConfig(TokenLossConfig):
    """Keys of every loss with sampled negatives.

    sharing: which tokens share negatives: those of the batch, of a row, or none. exclude_history: leave out
    negatives that occur in the token's own segment.
    """

    num_negatives: int = 256
    sampler: Literal["uniform", "popularity", "in_batch"] = "uniform"
    sharing: Literal["batch", "row", "position"] = "row"
    exclude_history: bool = False

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives={self.num_negatives} must be at least 1 ({name})")
        if self.sampler == "in_batch" and self.sharing != "batch":
            raise ValueError(
                f"sampler='in_batch' draws once for the whole batch: sharing={self.sharing!r} must be "
                f"'batch' ({name})"
            )


@dataclass(frozen=True, kw_only=True)
class SampledSoftmaxConfig(SampledLossConfig):
    type: Literal["sampled_softmax"] = "sampled_softmax"


@dataclass(frozen=True, kw_only=True)
class BCEConfig(SampledLossConfig):
    type: Literal["bce"] = "bce"


@dataclass(frozen=True, kw_only=True)
class GBCEConfig(SampledLossConfig):
    type: Literal["gbce"] = "gbce"
    calibration: float = 0.75  # t of the paper: 0 = plain BCE, 1 = fully calibrated

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.calibration <= 1:
            raise ValueError(f"calibration={self.calibration} must be in [0, 1] (GBCEConfig)")


LossConfig = SoftmaxConfig | SampledSoftmaxConfig | BCEConfig | GBCEConfig


class TokenLoss(Protocol):
    def __call__(
        self, x_BSD: jax.Array, catalogue: Catalogue, batch: Batch, negatives: Negatives, prior: ItemPrior
    ) -> jax.Array:
        """Returns the loss summed over tokens with a target, an f32 scalar.

        x_BSD: query vectors. catalogue: all items; for a loss with sampled negatives it may hold only the
        item vectors that were read: batch.local_ids and negatives.local_ids_BSK are indices into them.
        """


def make_token_loss(config: LossConfig) -> TokenLoss:
    return (softmax if isinstance(config, SoftmaxConfig) else Sampled)(config)


def is_sampled(config: LossConfig) -> bool:
    """Whether the loss reads only the targets and sampled negatives, not the whole catalogue."""
    return isinstance(config, SampledLossConfig)


def num_negatives(config: LossConfig, rows: int, length: int) -> int:
    """The number of negatives drawn for `rows` packed rows of `length` tokens."""
    if not is_sampled(config):
        return 0
    return config.num_negatives * {"batch": 1, "row": rows, "position": rows * length}[config.sharing]


def softmax(config: SoftmaxConfig) -> TokenLoss:
    """The cross-entropy over the catalogue, on one device or row-sharded.

    Source of popularity_discount, here and below: Menon et al., ICLR'21 (arXiv 2007.07314), eq. 10. Differs:
    also applied to losses with sampled negatives.
    """

    def loss(x_BSD, catalogue, batch, negatives, prior):
        x_TD, targets_T = x_BSD.reshape(-1, x_BSD.shape[-1]), batch.targets.reshape(-1)
        weights_T = (targets_T > 0).astype(jnp.float32)
        if config.ips_power:
            weights_T *= prior.weight_V[targets_T]
        return catalogue.cross_entropy(x_TD, targets_T, weights_T, prior.bias_V)

    return loss


@dataclass(frozen=True)
class Sampled:
    """A loss over the target and sampled negatives."""

    config: SampledLossConfig

    def __call__(self, x_BSD, catalogue, batch, negatives, prior):
        config, targets_BS, neg_BSK = self.config, batch.targets, negatives.ids_BSK
        neg_scores_BSK = item_scores(x_BSD, catalogue.vectors, negatives.local_ids_BSK)
        pos_BSD = catalogue.vectors[batch.lookup_ids("items", "targets", targets_BS)]
        pos_BS = jnp.sum(x_BSD * pos_BSD, axis=-1, dtype=jnp.float32)
        if config.popularity_discount:
            neg_scores_BSK += prior.bias_V[neg_BSK]
            pos_BS += prior.bias_V[targets_BS]
        dropped_BSK = neg_BSK == targets_BS[..., None]
        if config.exclude_history:
            dropped_BSK |= _in_history(neg_BSK, batch)
        if config.type == "sampled_softmax":
            loss_BS = _sampled_softmax(pos_BS, neg_scores_BSK, negatives.log_prob_BSK, dropped_BSK)
        else:
            beta = 1.0
            if config.type == "gbce":
                beta = gbce_beta(config.num_negatives, prior.sampler.num_items, config.calibration)
            # The constant at which positives and negatives balance (0 for one negative). It changes no
            # ranking. Without it, training first moves all vectors together to reach this score.
            prior_score = math.log(beta / config.num_negatives)
            neg_scores_BSK = jnp.where(dropped_BSK, _DROPPED, neg_scores_BSK + prior_score)
            loss_BS = jnp.sum(jax.nn.softplus(neg_scores_BSK), axis=-1)
            loss_BS -= beta * jax.nn.log_sigmoid(pos_BS + prior_score)
        if config.ips_power:
            loss_BS *= prior.weight_V[targets_BS]
        return jnp.sum(jnp.where(targets_BS > 0, loss_BS, 0))


def item_scores(x_BSD, vectors_XD, ids_BSK):
    """<x, vectors[ids]> in f32, [B, S, K]. The first two dims of ids_BSK may have size 1: tokens then share
    ids, and one matrix product scores them."""
    vectors = vectors_XD[ids_BSK]
    if ids_BSK.shape[:2] == (1, 1):
        return jnp.einsum("bsd,kd->bsk", x_BSD, vectors[0, 0], preferred_element_type=jnp.float32)
    if ids_BSK.shape[1] == 1:
        return jnp.einsum("bsd,bkd->bsk", x_BSD, vectors[:, 0], preferred_element_type=jnp.float32)
    return jnp.einsum("bsd,bskd->bsk", x_BSD, vectors, preferred_element_type=jnp.float32)


def gbce_beta(num_negatives: int, num_items: int, t: float) -> float:
    """The exponent of the positive's probability in gBCE.

    Source: Petrov & Macdonald, RecSys'23 (arXiv 2308.07192), eq. 13: with the sampling rate
    alpha = K / (V - 1), beta = alpha * (t * (1 - 1/alpha) + 1/alpha).
    """
    alpha = num_negatives / max(1, num_items - 1)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def _sampled_softmax(pos_BS, neg_scores_BSK, neg_log_prob_BSK, dropped_BSK):
    """-log(exp(pos) / Z) with Z = exp(pos) + sum over negatives of exp(score) / (K * q).

    Z is an unbiased estimate of the partition function over the catalogue: the positive is always included
    and needs no correction; a negative equal to it is left out. Source: Bengio & Senecal 2008 for the
    importance weights; Petrov et al., RecSys'25, also discuss the correction of the positive.
    """
    corrected = neg_scores_BSK - neg_log_prob_BSK - math.log(neg_scores_BSK.shape[-1])
    corrected = jnp.where(dropped_BSK, _DROPPED, corrected)
    both = jnp.concatenate([pos_BS[..., None], corrected], axis=-1)
    return jax.nn.logsumexp(both, axis=-1) - pos_BS


def _in_history(neg_BSK, batch: Batch):
    """bool[B, S, K]: whether the negative occurs anywhere in the token's own segment, as item or target."""
    same_BST = batch.segments[:, :, None] == batch.segments[:, None, :]
    neg_BSK = jnp.broadcast_to(neg_BSK, batch.segments.shape + neg_BSK.shape[-1:])

    def occurs(ids_BS):
        equal_BSTK = ids_BS[:, None, :, None] == neg_BSK[:, :, None, :]
        return jnp.any(equal_BSTK & same_BST[..., None], axis=2)

    return occurs(batch.items) | occurs(batch.targets)
