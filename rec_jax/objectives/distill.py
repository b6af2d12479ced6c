"""Distillation: a student learns from the scores, the rankings or the hidden states of trained teachers."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from rec_jax.objectives.softmax import TILE_ELEMENTS, dot_f32, dot_t_f32, tiled
from rec_jax.objectives.token_loss import item_scores

_DROPPED = -1e30


@dataclass(frozen=True)
class DistillConfig:
    """Distillation. teachers: working directories of trained runs on the same data; their probabilities are
    averaged.

    loss: "logits" is the divergence from the teachers' softmax over the catalogue (over the target and its
    negatives, if the student's own loss samples negatives). "ranking" uses only the order of the teachers'
    first `num_ranked` items. weight: the weight of this loss; the student's own loss has weight 1 - weight.
    hidden_weight: the weight of a loss that matches the similarities between hidden states, for which widths
    may differ; 0 = off.
    """

    teachers: tuple[str, ...] = ()
    loss: Literal["logits", "ranking"] = "logits"
    weight: float = 0.5
    temperature: float = 1.0
    num_ranked: int = 10
    hidden_weight: float = 0.0

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight} must be in [0, 1] (DistillConfig)")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive (DistillConfig)")
        if self.num_ranked < 1:
            raise ValueError(f"num_ranked={self.num_ranked} must be at least 1 (DistillConfig)")
        if self.hidden_weight < 0:
            raise ValueError(f"hidden_weight={self.hidden_weight} must not be negative (DistillConfig)")


def distill_sum(config: DistillConfig, own_loss, student, teachers, batch, negatives) -> jax.Array:
    """Mixes the student's own loss with the distillation losses, summed over real tokens of a micro-batch.

    own_loss: the student's own loss; not read if config.weight > 0 and negatives is None, because
    `soft_cross_entropy` computes it again. student: (x_BSD, table_VD, hidden states x_BSD of each block);
    teachers: a list of the same, of any widths. batch: targets int32[B, S] (0 = padding). negatives: those of
    a sampled loss, or None.
    """
    x_BSD, table_VD, hidden = student
    targets_BS = batch.targets
    real_BS = targets_BS > 0
    if config.weight and negatives is None:
        flat = [(x.reshape(-1, x.shape[-1]), table) for x, table, _ in teachers]
        weights_T, targets_T = real_BS.reshape(-1).astype(jnp.float32), targets_BS.reshape(-1)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        options = (config.weight, _transform(config), config.temperature)
        loss = soft_cross_entropy(x_TD, table_VD, flat, targets_T, weights_T, *options)
    elif config.weight:
        candidates = partial(_candidates, batch=batch, negatives=negatives, temperature=config.temperature)
        scores = [candidates(x, table) for x, table, _ in [student, *teachers]]
        soft_targets_BSK = _soft_targets(scores[1:], 1.0, _transform(config))
        log_BSK = jax.nn.log_softmax(scores[0])
        divergence_BS = config.temperature**2 * _divergence(soft_targets_BSK, log_BSK)
        distill_loss = jnp.sum(jnp.where(real_BS, divergence_BS, 0))
        loss = (1 - config.weight) * own_loss + config.weight * distill_loss
    else:
        loss = own_loss
    if config.hidden_weight:
        for _, _, teacher_hidden in teachers:
            hidden_loss = similarity_sum(hidden, teacher_hidden, real_BS)
            loss += config.hidden_weight / len(teachers) * hidden_loss
    return loss


def _transform(config: DistillConfig):
    """Returns the function from the teachers' mean probabilities to soft targets; None = unchanged."""
    return partial(_first_ranked, config.num_ranked) if config.loss == "ranking" else None


def _first_ranked(num: int, probs):
    """Soft targets that decay with the rank of an item, and are 0 after the first `num` items.

    Source: Tang & Wang, KDD'18 (arXiv 1809.07428), eq. 8: weights exp(-rank / lambda), here with
    lambda = num / 2. Differs: a cross-entropy over the catalogue, not a logistic loss per item.
    """
    num = min(num, probs.shape[-1] - 1)  # entry 0 is padding
    top_ids = jax.lax.top_k(probs, num)[1]
    weights = jax.nn.softmax(-jnp.arange(num) / (num / 2))
    return jnp.sum(jax.nn.one_hot(top_ids, probs.shape[-1]) * weights[:, None], axis=-2)


def _soft_targets(scores: list, temperature: float, transform):
    """The mean of the teachers' softmax distributions, transformed if `transform` is not None."""
    probs = sum(jax.nn.softmax(s / temperature) for s in scores) / len(scores)
    return probs if transform is None else transform(probs)


def _divergence(soft_targets, log_probs):
    """The Kullback-Leibler divergence over the last dim, without dropped candidates."""
    terms = soft_targets * (jnp.log(jnp.maximum(soft_targets, 1e-30)) - log_probs)
    return jnp.sum(jnp.where(log_probs > _DROPPED / 2, terms, 0), axis=-1)


def soft_cross_entropy(
    x_TD, table_VD, teachers: list, targets_T, weights_T, share=1.0, transform=None, temperature=1.0
):
    """Sum over tokens of weight * (share * temperature^2 * KL(teachers || student) + (1 - share) * CE), an
    f32 scalar. Both terms are over all items. CE: the student's own cross-entropy at the targets.

    teachers: [(x_TE, table_VE), ...], with the same items; transform: maps their mean probabilities to soft
    targets, None = unchanged. Entry 0 is padding and left out. Gradients flow to x_TD and table_VD only. Like
    those of `softmax_cross_entropy` they are computed in the forward pass, while a tile of probabilities is
    in cache, and both terms share the matrix products.
    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """

    @jax.custom_vjp
    def loss(x_TD, table_VD, fixed):
        return forward(x_TD, table_VD, fixed)[0]

    def forward(x_TD, table_VD, fixed):
        teachers, targets_T, weights_T = fixed
        num_tokens, num_rows = x_TD.shape[0], table_VD.shape[0]
        num_tiles = max(1, math.ceil(num_tokens * num_rows / TILE_ELEMENTS))
        size = math.ceil(num_tokens / num_tiles)

        def tile(carry, xs):
            total, dtable_VD = carry
            x_tD, teacher_xs, targets_t, weights_t = xs
            teacher_logits = [_logits(x, table) for x, (_, table) in zip(teacher_xs, teachers, strict=True)]
            soft_targets_tV = _soft_targets(teacher_logits, temperature, transform)
            logits_tV = _logits(x_tD, table_VD)
            log_tV = jax.nn.log_softmax(logits_tV / temperature)
            loss_t = share * temperature**2 * _divergence(soft_targets_tV, log_tV)
            dlogits_tV = share * temperature * (jnp.exp(log_tV) - soft_targets_tV)
            if share < 1:
                log_tV = log_tV if temperature == 1 else jax.nn.log_softmax(logits_tV)
                is_target_tV = jnp.arange(num_rows) == targets_t[:, None]
                loss_t -= (1 - share) * jnp.sum(jnp.where(is_target_tV, log_tV, 0), -1)
                dlogits_tV += (1 - share) * (jnp.exp(log_tV) - is_target_tV)
            dlogits_tV = (dlogits_tV * weights_t[:, None]).astype(x_tD.dtype)
            dx_tD = jnp.dot(dlogits_tV, table_VD, preferred_element_type=jnp.float32)
            # Padding has weight 0 and target 0, whose log-probability is about -1e30.
            total += jnp.sum(jnp.where(weights_t > 0, weights_t * loss_t, 0))
            return (total, dtable_VD + dot_t_f32(dlogits_tV, x_tD)), dx_tD

        split = partial(tiled, num_tiles=num_tiles, size=size)
        xs = (split(x_TD), [split(x) for x, _ in teachers], split(targets_T), split(weights_T))
        (total, dtable_VD), dx = jax.lax.scan(tile, (jnp.float32(0), jnp.zeros(table_VD.shape)), xs)
        dx_TD = dx.reshape(-1, x_TD.shape[1])[:num_tokens]
        return total, (dx_TD.astype(x_TD.dtype), dtable_VD.astype(table_VD.dtype))

    def backward(grads, dtotal):
        return *(g * dtotal.astype(g.dtype) for g in grads), None

    loss.defvjp(forward, backward)
    return loss(x_TD, table_VD, (teachers, targets_T, weights_T))


def _logits(x_TD, table_VD):
    return dot_f32(x_TD, table_VD).at[:, 0].set(_DROPPED)


def _candidates(x_BSD, table_VD, batch, negatives, temperature):
    """Scores of the target and the negatives divided by the temperature, [B, S, 1 + K], corrected as in a
    sampled softmax, so that their softmax estimates the softmax over the catalogue."""
    ids_BSK, targets_BS = negatives.ids_BSK, batch.targets
    scores_BSK = item_scores(x_BSD, table_VD, ids_BSK) / temperature
    scores_BSK -= negatives.log_prob_BSK + math.log(ids_BSK.shape[-1])
    scores_BSK = jnp.where(ids_BSK == targets_BS[..., None], _DROPPED, scores_BSK)
    target_BS = jnp.sum(x_BSD * table_VD[targets_BS], axis=-1, dtype=jnp.float32)
    return jnp.concatenate([target_BS[..., None] / temperature, scores_BSK], axis=-1)


def similarity_sum(hidden: list, teacher_hidden: list, real_BS) -> jax.Array:
    """The sum over rows of (mean squared difference between the cosine similarities of student and teacher,
    over all pairs of real tokens of the row) * (number of real tokens). Layers are matched at even distances,
    the last with the last.

    Source: Tung & Mori, ICCV'19 (arXiv 1907.09682), on tokens instead of images.
    """
    if not hidden or not teacher_hidden:
        raise ValueError(
            "hidden_weight needs a student and teachers with at least one layer: set hidden_weight=0 "
            "(DistillConfig)"
        )
    pairs_BST = real_BS[:, :, None] & real_BS[:, None, :]
    num_B = jnp.sum(real_BS, axis=1)
    total = 0.0
    for index, x_BSD in enumerate(hidden, 1):
        teacher_BSE = teacher_hidden[max(1, index * len(teacher_hidden) // len(hidden)) - 1]
        difference_BST = _cosines(x_BSD) - _cosines(teacher_BSE)
        squares_B = jnp.sum(jnp.where(pairs_BST, difference_BST**2, 0), axis=(1, 2))
        total += jnp.sum(squares_B / jnp.maximum(num_B, 1))  # the mean over num_B**2 pairs, times num_B
    return total / len(hidden)


def _cosines(x_BSD):
    x32 = x_BSD.astype(jnp.float32)
    unit = x32 * jax.lax.rsqrt(jnp.sum(x32**2, -1, keepdims=True) + 1e-12)
    return jnp.einsum("bsd,btd->bst", unit, unit)
