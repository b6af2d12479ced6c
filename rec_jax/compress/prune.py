"""Pruning: an optax transformation around the whole optimizer that sets weights to 0 and keeps them at 0.

    optimizer = prune(optimizer, PruneConfig(names=r".*kernel", share=0.7), params, total_steps, specs)

At some steps the weights with the lowest scores are masked, and masked weights stay masked. Scores are those
of the parameters before the step's update. The update sets a masked weight to exactly 0, so a trained model
needs no masks. Parameters may be sharded over a mesh: see `rec_jax/compress/lowest.py`.
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

ACCUMULATED = ("taylor", "movement")  # scores that are accumulated from gradients over steps
TAYLOR_DECAY = 0.9  # per step: a score is about the mean of the last 10 steps


@dataclass(frozen=True)
class PruneConfig:
    """Settings of pruning: which weights are set to 0, how many, and when.

    score: the weights with the lowest scores are pruned. For weight w and gradient g:
      magnitude: |w|; rows and columns sum w**2.
      taylor: a moving average of |w g|. Source: Molchanov et al., arXiv 1611.06440 and 1906.10771. Differs:
        rows and columns sum the absolute values.
      movement: the sum of -w g over all steps, high if w moves away from 0. Source: Sanh et al., arXiv
        2005.07683, section 4. Differs: a masked weight never returns.
      random: a hash of the seed and the weight's index, the same on every mesh; a control.
    scope: whether scores are compared over all matched parameters ("global") or within each one ("layer").
    structure: the units that are pruned: single weights, rows (one index of dim 0) or columns (one index of
      the last dim), by the sum of their scores; "2:4": the lowest 2 of every 4 neighbours along dim 0, the
      contracted dim. While the share grows, it prunes first one, then two of them.
    schedule: when to prune, see `make_prune_schedule`. iterative: after each round all parameters are reset
      to their values at `begin` (up to rounding). Source: Frankle et al., arXiv 1912.05671. Differs: the
      optimizer's state is reset to its init, so learning-rate schedules restart too.
    proximal: until the last change of the masks, each update ends with a proximal step on the matched
      weights, with strength s. l1: sign(w) max(|w| - s, 0), for the penalty s |w|; l2: w / (1 + s), for
      s w**2 / 2. Source: Parikh and Boyd, Proximal Algorithms, 2014, section 6. Differs: s does not depend on
      the learning rate.
    """

    names: str = ""  # regex over parameter names; "" = no pruning
    share: float = 0.7  # share of the matched weights that are 0 at the end
    score: Literal["magnitude", "taylor", "movement", "random"] = "magnitude"
    scope: Literal["global", "layer"] = "global"
    structure: Literal["weights", "rows", "columns", "2:4"] = "weights"
    schedule: Literal["one_shot", "cubic", "iterative"] = "cubic"
    begin: float = 0.0  # share of all steps after which pruning begins
    end: float = 0.5  # share of all steps after which the masks no longer change
    num_updates: int = 20  # number of changes of the masks; for "iterative", of rounds
    proximal: Literal["none", "l1", "l2"] = "none"
    proximal_strength: float = 0.0
    hold: str = ""  # regex over parameter names: weights that are 0 when training begins stay 0

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share} must be in [0, 1) (PruneConfig)")
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(
                f"begin={self.begin} and end={self.end} must satisfy 0 <= begin <= end <= 1 (PruneConfig)"
            )
        if self.schedule == "iterative" and not self.begin < self.end < 1:
            raise ValueError(
                f"schedule='iterative' needs begin={self.begin} < end={self.end} < 1: after each round the "
                "weights are reset and trained again (PruneConfig)"
            )
        if self.num_updates < 1:
            raise ValueError(f"num_updates={self.num_updates} must be at least 1 (PruneConfig)")
        if self.structure == "2:4" and self.share != 0.5:
            raise ValueError(f"share={self.share} must be 0.5 with structure='2:4' (PruneConfig)")
        if self.proximal_strength < 0:
            raise ValueError(f"proximal_strength={self.proximal_strength} must not be negative (PruneConfig)")
        if (self.proximal == "none") != (self.proximal_strength == 0):
            raise ValueError(
                f"proximal={self.proximal!r} is not supported with proximal_strength="
                f"{self.proximal_strength}: set both or neither (PruneConfig)"
            )


def make_prune_schedule(config: PruneConfig, total_steps: int) -> optax.Schedule:
    """Returns a function step -> the share that is pruned after so many steps.

    The masks change num_updates times, at even distances from `begin` (excluded) to `end`; for one_shot once,
    at `end`. With t the share of these changes that are done, the pruned share is, for cubic:
    share (1 - (1 - t)**3); for iterative: 1 - (1 - share)**t, so that each round prunes the same share of the
    remaining weights.
    Source: Zhu and Gupta, arXiv 1710.01878, eq. 1, with an initial share of 0.
    """
    steps, shares = _rounds(config, total_steps)
    all_shares = jnp.asarray([0.0, *shares], jnp.float32)
    return lambda step: all_shares[jnp.searchsorted(steps, step, side="right")]


def _rounds(config: PruneConfig, total_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps, shares): the steps after which masks change, and the pruned share from then on."""
    num_rounds = 1 if config.schedule == "one_shot" else config.num_updates
    t = np.arange(1, num_rounds + 1) / num_rounds
    if config.schedule == "iterative":
        shares = 1 - (1 - config.share) ** t
    else:
        shares = config.share * (1 - (1 - t) ** 3)
    steps = np.round((config.begin + t * (config.end - config.begin)) * total_steps)
    return np.maximum(steps, 1).astype(np.int32), shares


def last_rewind(config: PruneConfig, total_steps: int, step: int) -> int:
    """The number of steps done when the optimizer was last reset before a 0-based step; 0 unless the schedule
    is "iterative"."""
    if not config.names or config.schedule != "iterative":
        return 0
    return int(max((done for done in _rounds(config, total_steps)[0] if done <= step), default=0))


class PruneState(NamedTuple):
    """The state of `prune`. masks, scores and rewind have the shapes and the sharding of the parameters."""

    count: jax.Array  # int32 scalar: the number of steps done
    masks: Any  # bool: whether a weight is kept; all True for parameters that are not matched
    scores: Any  # f32, or () if no score is accumulated
    rewind: Any  # the parameters at `begin`, or () unless the schedule is iterative
    inner: Any


def prune(
    inner: optax.GradientTransformation,
    config: PruneConfig,
    params,
    total_steps: int,
    specs=None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """The optimizer `inner` with pruning masks. Its updates must be added to the parameters unchanged.

    params: only names and shapes are read. specs: a tree of PartitionSpecs if `update` runs inside a
    shard_map; parameters, gradients and state are then this device's shards. seed: for random scores.

    Weights with equal scores are pruned together, so the pruned share may be larger than config.share. Whole
    rows or columns may exceed it by up to one row or column. On another mesh the sums over rows and columns
    round differently.

    Raises ValueError, listing the names, if config.names matches none; in `update`, naming the parameter, if
    dim 0 of a shard does not divide into groups of 4 for "2:4".
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

        is_due, index = jnp.any(step == steps), jnp.searchsorted(steps, step, side="right") - 1
        masks = jax.lax.cond(is_due, lambda: choose(index, params, state.masks, scores), lambda: state.masks)
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
    masks: Any  # bool, with the shapes of the parameters
    inner: Any


def hold_zeros(inner: optax.GradientTransformation, names: str, params) -> optax.GradientTransformation:
    """The optimizer `inner` with updates that keep zeros at 0, to train a pruned model further.

    names: regex over parameter names. params: only names are read; `init` finds out which weights are 0.
    Raises ValueError, listing the names, if none matches.
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
    """The share of zeros among the weights of the parameters whose names match the regex.

    Raises ValueError if no name matches.
    """
    matched = leaf_names(leaf_mask(params, names, field="names"))
    chosen = [x for name, x in leaf_names(params).items() if matched[name]]
    return sum(int(jnp.sum(x == 0)) for x in chosen) / sum(x.size for x in chosen)


def _difference(update, new, old):
    return new.astype(update.dtype) - old.astype(update.dtype)


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
