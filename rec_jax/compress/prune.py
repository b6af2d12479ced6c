"""Pruning: an optax transformation around the whole optimizer that sets weights to 0 and keeps them there.

    optimizer = prune(optimizer, PruneConfig(names=r".*kernel", share=0.7), params, total_steps, specs)

At some of the steps the weights with the lowest scores, as the gradient of the step sees them, are masked;
what is masked stays so. Its update takes a masked weight to exactly 0, so the parameters need no masks when a
model is used. They may be sharded over a mesh: see `rec_jax/compress/lowest.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rec_jax.compress.lowest import find_leaves, make_chooser, with_leaves
from rec_jax.tree import leaf_mask, leaf_names

ACCUMULATED = ("taylor", "movement")  # scores that take more than the weights
TAYLOR_DECAY = 0.9  # a step: a score is about the mean of the last 10


@dataclass(frozen=True)
class PruneConfig:
    """Which weights become 0, how many and when.

    score (the lowest are pruned), for weight w and gradient g:
      magnitude: |w|. Sums over rows and columns are of w**2.
      taylor: |w g|, as a moving average. Source: Molchanov et al., arXiv 1611.06440 and 1906.10771. Differs:
        a row or column takes the sum of its absolute values.
      movement: the sum of -w g over all steps, high where w moves away from 0. Source: Sanh et al., arXiv
        2005.07683, section 4. Differs: a masked weight never comes back.
      random: a hash of seed and place, the same on every mesh; a control.
    scope: whether the lowest are found among all matched parameters or in each on its own.
    structure: what is pruned as one: weights, rows (places along dim 0) or columns (along the last dim), by
      the sum of their scores; "2:4": the lower 2 of every 4 neighbours along dim 0, the contracted one, one
      after another as the share grows.
    schedule: when, see `make_prune_schedule`. iterative: after each round all parameters go back to their
      values at `begin` (but for rounding). Source: Frankle et al., arXiv 1912.05671. Differs: the optimizer's
      state goes back to its init, so schedules of the learning rate begin anew too.
    proximal: up to the last masks each update ends with a proximal step on the matched weights, with strength
      s. l1: sign(w) max(|w| - s, 0), of s |w|; l2: w / (1 + s), of s w**2 / 2. Source: Parikh and Boyd,
      Proximal Algorithms, 2014, section 6. Differs: s does not follow the learning rate.
    """

    names: str = ""  # regex over parameter names; "" = no pruning
    share: float = 0.7  # of the matched weights that are 0 in the end
    score: Literal["magnitude", "taylor", "movement", "random"] = "magnitude"
    scope: Literal["global", "layer"] = "global"
    structure: Literal["weights", "rows", "columns", "2:4"] = "weights"
    schedule: Literal["one_shot", "cubic", "iterative"] = "cubic"
    begin: float = 0.0  # of all steps
    end: float = 0.5  # of all steps: from here on the masks stay
    num_updates: int = 20  # of the masks: rounds, for "iterative"
    proximal: Literal["none", "l1", "l2"] = "none"
    proximal_strength: float = 0.0
    hold: str = ""  # regex over parameter names: what is 0 when the training begins stays 0

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share} must be in [0, 1) (PruneConfig)")
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(
                f"begin={self.begin} and end={self.end} must be in [0, 1], in this order (PruneConfig)"
            )
        if self.schedule == "iterative" and not self.begin < self.end < 1:
            raise ValueError(
                f"schedule='iterative' needs begin={self.begin} < end={self.end} < 1: after each round the "
                "weights go back and are to be trained again (PruneConfig)"
            )
        if self.num_updates < 1:
            raise ValueError(f"num_updates={self.num_updates} must be at least 1 (PruneConfig)")
        if self.structure == "2:4" and self.share != 0.5:
            raise ValueError(f"share={self.share} must be 0.5 where structure='2:4' (PruneConfig)")
        if self.proximal_strength < 0:
            raise ValueError(f"proximal_strength={self.proximal_strength} must not be negative (PruneConfig)")
        if (self.proximal == "none") != (self.proximal_strength == 0):
            raise ValueError(
                f"proximal={self.proximal!r} is not supported with proximal_strength="
                f"{self.proximal_strength}: set both or neither (PruneConfig)"
            )


def make_prune_schedule(config: PruneConfig, total_steps: int) -> optax.Schedule:
    """step -> the share that is pruned once so many steps are done.

    The masks change num_updates times, evenly from `begin` (excluded) to `end`; for one_shot once, at `end`.
    After t of these times: cubic: share (1 - (1 - t)**3); iterative: 1 - (1 - share)**t, so that each round
    prunes the same share of what is left.
    Source: Zhu and Gupta, arXiv 1710.01878, eq. 1, from 0.
    """
    steps, shares = _rounds(config, total_steps)
    all_shares = jnp.asarray([0.0, *shares], jnp.float32)
    return lambda step: all_shares[jnp.searchsorted(steps, step, side="right")]


def _rounds(config: PruneConfig, total_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps after which masks are computed, and the shares that they prune."""
    num_rounds = 1 if config.schedule == "one_shot" else config.num_updates
    t = np.arange(1, num_rounds + 1) / num_rounds
    if config.schedule == "iterative":
        shares = 1 - (1 - config.share) ** t
    else:
        shares = config.share * (1 - (1 - t) ** 3)
    steps = np.round((config.begin + t * (config.end - config.begin)) * total_steps)
    return np.maximum(steps, 1).astype(np.int32), shares


def last_rewind(config: PruneConfig, total_steps: int, step: int) -> int:
    """How many steps were done when the optimizer last began anew before a 0-based step: 0, unless rounds
    are "iterative"."""
    if not config.names or config.schedule != "iterative":
        return 0
    return int(max((done for done in _rounds(config, total_steps)[0] if done <= step), default=0))


class PruneState(NamedTuple):
    """masks, scores and rewind are shaped as the parameters and lie on a mesh as these do."""

    count: jax.Array  # int32 scalar: steps done
    masks: Any  # bool: is a weight kept? All true for parameters that are not matched
    scores: Any  # f32, () where no score is accumulated
    rewind: Any  # parameters at `begin`, () unless the schedule is iterative
    inner: Any


def prune(
    inner: optax.GradientTransformation,
    config: PruneConfig,
    params,
    total_steps: int,
    specs=None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """The optimizer `inner`, with masks. Its updates must be added to the parameters as they are.

    params: only names and shapes are read. specs: a tree of PartitionSpecs, where `update` runs inside a
    shard_map; parameters, gradients and state are then this device's parts. seed: of random scores.

    Equal scores are pruned together, so more than the share may be; rows and columns are too, up to one
    more than the share. On another mesh the sums over rows and columns round differently.

    Raises ValueError, listing the names, if config.names matches none; in `update`, naming the parameter, if
    dim 0 of a part cannot be cut into groups of 4 for "2:4".
    """
    if not config.names:
        return inner
    is_matched = leaf_mask(params, config.names, field="compress.prune.names")
    steps, shares = _rounds(config, total_steps)
    begin_step = round(config.begin * total_steps)
    choose = make_chooser(config, find_leaves(params, is_matched, specs), shares, seed)

    def init(params):
        scores, rewind = (), ()
        if config.score in ACCUMULATED:
            scores = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        if config.schedule == "iterative":
            rewind = jax.tree.map(jnp.copy, params)
        masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
        return PruneState(jnp.zeros((), jnp.int32), masks, scores, rewind, inner.init(params))

    def on_matched(f, tree, *rest):
        return jax.tree.map(lambda is_in, x, *xs: f(x, *xs) if is_in else x, is_matched, tree, *rest)

    def update(grads, state, params):
        step = state.count + 1
        scores, rewind = state.scores, state.rewind
        if config.score in ACCUMULATED:
            scores = on_matched(partial(_accumulate, config), scores, params, grads)
        updates, inner_state = inner.update(grads, state.inner, params)
        if config.proximal != "none":
            shrunk = on_matched(lambda u, p: _proximal_step(config, p + u) - p, updates, params)
            updates = jax.tree.map(lambda u, v: jnp.where(step <= steps[-1], v, u), updates, shrunk)

        is_due, at = jnp.any(step == steps), jnp.searchsorted(steps, step, side="right") - 1
        masks = jax.lax.cond(is_due, lambda: choose(at, params, state.masks, scores), lambda: state.masks)
        if config.schedule == "iterative":
            is_begin = state.count == begin_step
            rewind = jax.tree.map(lambda r, p: jnp.where(is_begin, p, r), rewind, params)
            updates, inner_state = jax.lax.cond(
                is_due,
                lambda: (jax.tree.map(_difference, updates, rewind, params), inner.init(rewind)),
                lambda: (updates, inner_state),
            )
        updates = on_matched(_to_zero, updates, params, masks)
        return updates, PruneState(step, masks, scores, rewind, inner_state)

    return optax.GradientTransformation(init, update)


class HoldState(NamedTuple):
    masks: Any  # bool, as the parameters
    inner: Any


def hold_zeros(inner: optax.GradientTransformation, names: str, params) -> optax.GradientTransformation:
    """The optimizer `inner`, under which zeros stay zeros: to train on what has been pruned.

    names: regex over parameter names. params: only names are read; which weights are 0, `init` sees. Raises
    ValueError, listing the names, if none matches.
    """
    is_matched = leaf_mask(params, names, field="compress.prune.hold")
    matched = leaf_names(is_matched)

    def init(params):
        all_kept = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
        kept = {name: x != 0 for name, x in leaf_names(params).items() if matched[name]}
        return HoldState(with_leaves(all_kept, kept), inner.init(params))

    def update(grads, state, params):
        updates, inner_state = inner.update(grads, state.inner, params)
        updates = jax.tree.map(
            lambda is_in, *leaves: _to_zero(*leaves) if is_in else leaves[0],
            is_matched, updates, params, state.masks,
        )  # fmt: skip
        return updates, HoldState(state.masks, inner_state)

    return optax.GradientTransformation(init, update)


def share_of_zeros(params, names: str = ".*") -> float:
    """Of the weights of the parameters whose names match the regex. Raises ValueError if none does."""
    matched = leaf_names(leaf_mask(params, names, field="names"))
    chosen = [x for name, x in leaf_names(params).items() if matched[name]]
    return sum(int(jnp.sum(x == 0)) for x in chosen) / sum(x.size for x in chosen)


def _difference(like, to, back):
    return to.astype(like.dtype) - back.astype(like.dtype)


def _to_zero(update, param, mask):
    return jnp.where(mask, update, -param)  # p + (-p) is exactly 0


def _accumulate(config: PruneConfig, score, weight, grad):
    if config.score == "movement":
        return score - weight * grad
    return TAYLOR_DECAY * score + (1 - TAYLOR_DECAY) * jnp.abs(weight * grad)


def _proximal_step(config: PruneConfig, w):
    if config.proximal == "l1":
        return jnp.sign(w) * jnp.maximum(jnp.abs(w) - config.proximal_strength, 0)
    return w / (1 + config.proximal_strength)
