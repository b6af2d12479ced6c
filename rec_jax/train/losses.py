"""Losses over packed rows. Each returns (sum over real tokens, number of real tokens), so that sums over
micro-batches and devices equal the full batch."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rec_jax.data.negatives import Sampler
from rec_jax.hashing import mix, words
from rec_jax.nn.sharded import Placement, shard_index
from rec_jax.nn.softmax import item_scores, sharded_softmax_cross_entropy, softmax_cross_entropy

_DROPPED = -1e30  # the score of a negative that does not count
_SHARED = 1  # sets the key of shared negatives apart from those of rows


@dataclass(frozen=True)
class LossConfig:
    type: Literal["softmax", "sampled_softmax", "bce", "gbce"] = "softmax"
    num_negatives: int = 256  # not read by "softmax", which is exact
    sampler: Literal["uniform", "popularity", "in_batch"] = "uniform"
    sharing: Literal["batch", "row", "position"] = "row"  # which tokens see the same negatives
    exclude_history: bool = False  # drop a negative that stands in the token's own packed history
    gbce_t: float = 0.75  # calibration of gBCE: 0 = plain BCE, 1 = fully calibrated
    ips_power: float = 0.0  # targets weigh their training events to minus this power; 0 = all weigh alike
    ips_clip: float = 100.0  # at most so many times the weight of the most frequent item
    # Times log-popularity is added to scores in training only, so that they learn to do without: above 0
    # favours the long tail.
    popularity_discount: float = 0.0
    matryoshka: tuple[int, ...] = ()  # the mean loss of so many first dims each, and of all
    future_weight: float = 1.0  # of each head of model.num_future but the first

    def __post_init__(self):
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives={self.num_negatives} must be at least 1 (LossConfig)")
        if not 0 <= self.gbce_t <= 1:
            raise ValueError(f"gbce_t={self.gbce_t} must be in [0, 1] (LossConfig)")
        if self.ips_power < 0:
            raise ValueError(f"ips_power={self.ips_power} must be 0 (off) or more (LossConfig)")
        if list(self.matryoshka) != sorted({dims for dims in self.matryoshka if dims > 0}):
            raise ValueError(f"matryoshka={self.matryoshka} must be positive and increase (LossConfig)")
        if self.future_weight < 0:
            raise ValueError(f"future_weight={self.future_weight} must not be negative (LossConfig)")
        if self.ips_clip < 1:
            raise ValueError(f"ips_clip={self.ips_clip} must be at least 1 (LossConfig)")
        if self.sampler == "in_batch" and self.sharing != "batch":
            raise ValueError(
                f"sampler='in_batch' draws once for the whole batch: sharing={self.sharing!r} must be "
                "'batch' (LossConfig)"
            )


class Negatives(NamedTuple):
    """Drawn item ids and their log-probabilities, of shape [1, 1, K], [B, 1, K] or [B, S, K]."""

    ids_BSK: jax.Array
    log_prob_BSK: jax.Array
    bias_BSK: jax.Array | None = None  # added to their scores
    places_BSK: jax.Array | None = None  # where they are among the entries of the table that were read


def draw_shared(config: LossConfig, sampler: Sampler | None, seed, targets_BS) -> Negatives:
    """Negatives that the whole batch shares, [1, 1, K]; none, K = 0, where it shares none.

    seed: uint32 scalar of this step; targets_BS: of the full batch, over all devices and micro-batches.
    """
    if config.type == "softmax" or config.sharing != "batch":
        return Negatives(jnp.zeros((1, 1, 0), jnp.int32), jnp.zeros((1, 1, 0)))
    key_B, shape = mix(seed, _SHARED)[None], (1, config.num_negatives)
    if config.sampler != "in_batch":
        return _described(config, sampler, sampler.draw(key_B, shape))
    flat_T = targets_BS.reshape(-1)
    real_first_T = flat_T[jnp.argsort(flat_T == 0, stable=True)]
    num_real = jnp.maximum(jnp.sum(flat_T > 0), 1).astype(jnp.uint32)
    return _described(config, sampler, real_first_T[words(key_B, 0, shape) % num_real])


def draw_negatives(
    config: LossConfig, sampler: Sampler | None, key_B, length: int, shared: Negatives
) -> Negatives:
    """Negatives of each row or position, or the shared ones.

    key_B: uint32[B] from `hashing.row_keys`, one a row; length: S; shared: from `draw_shared`.
    """
    if config.type == "softmax" or config.sharing == "batch":
        return shared
    shape = (1 if config.sharing == "row" else length, config.num_negatives)
    return _described(config, sampler, sampler.draw(key_B, shape))


def _described(config: LossConfig, sampler: Sampler, ids_BSK) -> Negatives:
    bias_BSK = sampler.bias_V[ids_BSK] if config.popularity_discount else None
    return Negatives(ids_BSK, sampler.log_prob(ids_BSK), bias_BSK, ids_BSK)


def loss_sum(
    config: LossConfig, sampler: Sampler | None, x_BSD, table_VD, batch, negatives: Negatives
) -> tuple:
    """The summed loss of one micro-batch and the number of its real tokens, both f32 scalars.

    table_VD: the catalogue's vectors; or, but for "softmax", those of any ids, among which batch.places and
    negatives.places_BSK say where targets and negatives are.

    Source of popularity_discount: Menon et al., ICLR'21 (arXiv 2007.07314), eq. 10. Differs: also for losses
    of sampled negatives.
    """
    targets_BS = batch.targets
    real_BS = targets_BS > 0
    count = jnp.sum(real_BS, dtype=jnp.float32)
    if config.type == "softmax":
        flat = x_BSD.reshape(-1, x_BSD.shape[-1])
        if config.popularity_discount:
            flat, table_VD = _with_bias(flat, table_VD, sampler.bias_V)
        weights_T = _weights(config, sampler, targets_BS)
        return softmax_cross_entropy(flat, table_VD, targets_BS.reshape(-1), weights_T), count

    neg_BSK = negatives.ids_BSK
    neg_scores_BSK = item_scores(x_BSD, table_VD, negatives.places_BSK)
    pos_BS = jnp.sum(
        x_BSD * table_VD[batch.place("items", "targets", targets_BS)], axis=-1, dtype=jnp.float32
    )
    if config.popularity_discount:
        neg_scores_BSK += negatives.bias_BSK
        pos_BS += sampler.bias_V[targets_BS]
    dropped_BSK = neg_BSK == targets_BS[..., None]
    if config.exclude_history:
        dropped_BSK |= _in_history(neg_BSK, batch)
    if config.type == "sampled_softmax":
        loss_BS = _sampled_softmax(pos_BS, neg_scores_BSK, negatives.log_prob_BSK, dropped_BSK)
    else:
        beta = 1.0
        if config.type == "gbce":
            beta = gbce_beta(config.num_negatives, sampler.num_items, config.gbce_t)
        # Scores start where positives and negatives balance (0 for one negative), as a constant that no
        # ranking sees: else all vectors first move together to reach it, and learning starts epochs later.
        prior = math.log(beta / config.num_negatives)
        neg_BSK = jnp.where(dropped_BSK, _DROPPED, neg_scores_BSK + prior)
        loss_BS = jnp.sum(jax.nn.softplus(neg_BSK), axis=-1) - beta * jax.nn.log_sigmoid(pos_BS + prior)
    if config.ips_power:
        loss_BS *= sampler.weight_V[targets_BS]
    return jnp.sum(jnp.where(real_BS, loss_BS, 0)), count


def sharded_softmax_sum(config: LossConfig, sampler, placement: Placement, x_BSD, table_vD, batch):
    """The same for "softmax" where the rows of the table are spread over a mesh, inside a shard_map.

    table_vD: the rows of this device. batch.places: of the targets in the whole array.
    """
    rows_v = shard_index() * len(table_vD) + jnp.arange(len(table_vD))
    flat = x_BSD.reshape(-1, x_BSD.shape[-1])
    if config.popularity_discount:
        flat, table_vD = _with_bias(flat, table_vD, sampler.bias_V[placement.to_ids(rows_v)])
    real_BS = batch.targets > 0
    rows_T = batch.places["items"]["targets"].reshape(-1)
    weights_T = _weights(config, sampler, batch.targets)
    loss = sharded_softmax_cross_entropy(flat, table_vD, placement.is_real(rows_v), rows_T, weights_T)
    return loss, jnp.sum(real_BS, dtype=jnp.float32)


def _weights(config: LossConfig, sampler, targets_BS) -> jax.Array:
    """f32[T] of each token; 0 for padding."""
    targets_T = targets_BS.reshape(-1)
    weights_T = (targets_T > 0).astype(jnp.float32)
    return weights_T * sampler.weight_V[targets_T] if config.ips_power else weights_T


def _with_bias(x_TD, table_VD, bias_V):
    """The same with one dim more, whose products are the bias: a softmax that streams, streams it too."""
    x_TD = jnp.pad(x_TD, ((0, 0), (0, 1)), constant_values=1)
    return x_TD, jnp.concatenate([table_VD, bias_V[:, None].astype(table_VD.dtype)], axis=1)


def gbce_beta(num_negatives: int, num_items: int, t: float) -> float:
    """The power of the positive's probability in gBCE.

    Source: Petrov & Macdonald, RecSys'23 (arXiv 2308.07192), eq. 13: with the sampling rate
    alpha = K / (V - 1), beta = alpha * (t * (1 - 1/alpha) + 1/alpha).
    """
    alpha = num_negatives / max(1, num_items - 1)
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def _sampled_softmax(pos_BS, neg_scores_BSK, neg_log_prob_BSK, dropped_BSK):
    """-log(exp(pos) / Z) with Z = exp(pos) + sum over negatives of exp(score) / (K * q).

    Z is an unbiased estimate of the partition over the catalogue: the positive is there for certain and
    needs no correction, and a negative equal to it is dropped. Source: Bengio & Senecal 2008 for the
    importance weights; the case of the positive is also argued in Petrov et al., RecSys'25.
    """
    corrected = neg_scores_BSK - neg_log_prob_BSK - math.log(neg_scores_BSK.shape[-1])
    corrected = jnp.where(dropped_BSK, _DROPPED, corrected)
    both = jnp.concatenate([pos_BS[..., None], corrected], axis=-1)
    return jax.nn.logsumexp(both, axis=-1) - pos_BS


def _in_history(neg_BSK, batch):
    """bool[B, S, K]: does the negative occur anywhere in the token's own segment, as item or target?"""
    same_BST = batch.segments[:, :, None] == batch.segments[:, None, :]
    neg_BSK = jnp.broadcast_to(neg_BSK, batch.segments.shape + neg_BSK.shape[-1:])

    def occurs(ids_BS):
        equal_BSTK = ids_BS[:, None, :, None] == neg_BSK[:, :, None, :]
        return jnp.any(equal_BSTK & same_BST[..., None], axis=2)

    return occurs(batch.items) | occurs(batch.targets)
