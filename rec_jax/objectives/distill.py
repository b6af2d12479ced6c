"""Distillation: a student learns from the scores, the ranking or the hidden states of trained teachers."""

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
    """teachers: working directories of trained runs on the same data; their probabilities are averaged.

    loss: "logits" is the divergence from the teachers' softmax over the catalogue (over the target and its
    negatives, where the student's own loss samples). "ranking" takes only the order of their first
    `num_ranked` items. weight: of this loss; the student's own has the rest. hidden_weight: of a loss that
    asks for the teacher's similarities between hidden states, and so for no equal widths; 0 = off.
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
    """The student's own loss and what the teachers add, summed over the real tokens of a micro-batch.

    student: (x_BSD, table_VD, hidden states x_BSD of each block); teachers: a list of the same, of any
    widths. batch: targets int32[B, S] (0 = padding), segments. negatives: of a sampled loss, or None.
    """
    x_BSD, table_VD, hidden = student
    targets_BS = batch.targets
    real_BS = targets_BS > 0
    if config.weight and negatives is None:
        flat = [(x.reshape(-1, x.shape[-1]), table) for x, table, _ in teachers]
        weights_T, targets_T = real_BS.reshape(-1).astype(jnp.float32), targets_BS.reshape(-1)
        x_TD, rest = x_BSD.reshape(-1, x_BSD.shape[-1]), (config.weight, _aim(config), config.temperature)
        loss = soft_cross_entropy(x_TD, table_VD, flat, targets_T, weights_T, *rest)
    elif config.weight:
        candidates = partial(_candidates, batch=batch, negatives=negatives, temperature=config.temperature)
        scores = [candidates(x, table) for x, table, _ in [student, *teachers]]
        aim_BSK = _mean_probs(scores[1:], 1.0, _aim(config))
        log_BSK = jax.nn.log_softmax(scores[0])
        divergence_BS = config.temperature**2 * _divergence(aim_BSK, log_BSK)
        taught = jnp.sum(jnp.where(real_BS, divergence_BS, 0))
        loss = (1 - config.weight) * own_loss + config.weight * taught
    else:
        loss = own_loss
    if config.hidden_weight:
        for _, _, their_hidden in teachers:
            apart = similarity_sum(hidden, their_hidden, real_BS)
            loss += config.hidden_weight / len(teachers) * apart
    return loss


def _aim(config: DistillConfig):
    """Teachers' probabilities -> the distribution that the student is to have."""
    return partial(_first_ranked, config.num_ranked) if config.loss == "ranking" else None


def _first_ranked(num: int, probs):
    """Probabilities that fall with the place in the list and say nothing of the rest.

    Source: Tang & Wang, KDD'18 (arXiv 1809.07428), eq. 8: weights exp(-place / lambda), here with
    lambda = num / 2. Differs: a cross-entropy over the catalogue, not a logistic loss of each item.
    """
    num = min(num, probs.shape[-1] - 1)  # row 0 is padding
    places = jax.lax.top_k(probs, num)[1]
    weights = jax.nn.softmax(-jnp.arange(num) / (num / 2))
    return jnp.sum(jax.nn.one_hot(places, probs.shape[-1]) * weights[:, None], axis=-2)


def _mean_probs(scores: list, temperature: float, aim):
    probs = sum(jax.nn.softmax(s / temperature) for s in scores) / len(scores)
    return probs if aim is None else aim(probs)


def _divergence(aim, log_probs):
    """Kullback-Leibler, over the last dim; what both leave out does not count."""
    terms = aim * (jnp.log(jnp.maximum(aim, 1e-30)) - log_probs)
    return jnp.sum(jnp.where(log_probs > _DROPPED / 2, terms, 0), axis=-1)


def soft_cross_entropy(
    x_TD, table_VD, teachers: list, targets_T, weights_T, share=1.0, aim=None, temperature=1.0
):
    """Sum over tokens of weight * (share * temperature^2 * KL(teachers || student) + (1 - share) * CE), a f32
    scalar over all items. CE: the student's own cross-entropy at the targets.

    teachers: [(x_TE, table_VE), ...], of the same rows; aim: maps their mean probabilities to what is wanted
    of the student. Row 0 takes no part. Gradients flow to x_TD and table_VD only; like those of
    `softmax_cross_entropy` they are formed in the forward pass, while a tile of probabilities is in cache,
    and both losses share their products.
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
            x_tD, their_xs, targets_t, weights_t = xs
            theirs = [_logits(x, table) for x, (_, table) in zip(their_xs, teachers, strict=True)]
            aim_tV = _mean_probs(theirs, temperature, aim)
            logits_tV = _logits(x_tD, table_VD)
            log_tV = jax.nn.log_softmax(logits_tV / temperature)
            loss_t = share * temperature**2 * _divergence(aim_tV, log_tV)
            dlogits_tV = share * temperature * (jnp.exp(log_tV) - aim_tV)
            if share < 1:
                log_tV = log_tV if temperature == 1 else jax.nn.log_softmax(logits_tV)
                is_target_tV = jnp.arange(num_rows) == targets_t[:, None]
                loss_t -= (1 - share) * jnp.sum(jnp.where(is_target_tV, log_tV, 0), -1)
                dlogits_tV += (1 - share) * (jnp.exp(log_tV) - is_target_tV)
            dlogits_tV = (dlogits_tV * weights_t[:, None]).astype(x_tD.dtype)
            dx_tD = jnp.dot(dlogits_tV, table_VD, preferred_element_type=jnp.float32)
            # Padding has target 0, whose log-probability is none, and weight 0.
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
    """Scores of the target and the negatives over the temperature, [B, S, 1 + K]; corrected like those of a
    sampled softmax, so that their softmax estimates that over the catalogue."""
    ids_BSK, targets_BS = negatives.ids_BSK, batch.targets
    scores_BSK = item_scores(x_BSD, table_VD, ids_BSK) / temperature
    scores_BSK -= negatives.log_prob_BSK + math.log(ids_BSK.shape[-1])
    scores_BSK = jnp.where(ids_BSK == targets_BS[..., None], _DROPPED, scores_BSK)
    target_BS = jnp.sum(x_BSD * table_VD[targets_BS], axis=-1, dtype=jnp.float32)
    return jnp.concatenate([target_BS[..., None] / temperature, scores_BSK], axis=-1)


def similarity_sum(hidden: list, their_hidden: list, real_BS) -> jax.Array:
    """How far cosine similarities of the tokens of a row differ from the teacher's: mean square over pairs of
    the row, times the number of its real tokens. Layers are matched evenly, last with last.

    Source: Tung & Mori, ICCV'19 (arXiv 1907.09682), on tokens instead of images.
    """
    if not hidden or not their_hidden:
        raise ValueError("hidden_weight needs student and teachers of at least one layer (DistillConfig)")
    pairs_BST = real_BS[:, :, None] & real_BS[:, None, :]
    num_B = jnp.sum(real_BS, axis=1)
    total = 0.0
    for index, x_BSD in enumerate(hidden, 1):
        theirs_BSE = their_hidden[max(1, index * len(their_hidden) // len(hidden)) - 1]
        apart_BST = _cosines(x_BSD) - _cosines(theirs_BSE)
        squares_B = jnp.sum(jnp.where(pairs_BST, apart_BST**2, 0), axis=(1, 2))
        total += jnp.sum(squares_B / jnp.maximum(num_B, 1))  # num_B of num_B**2 pairs
    return total / len(hidden)


def _cosines(x_BSD):
    x32 = x_BSD.astype(jnp.float32)
    unit = x32 * jax.lax.rsqrt(jnp.sum(x32**2, -1, keepdims=True) + 1e-12)
    return jnp.einsum("bsd,btd->bst", unit, unit)
