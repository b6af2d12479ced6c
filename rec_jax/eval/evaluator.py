"""Full-catalogue evaluation of anything that scores items."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.data.histories import Examples, examples
from rec_jax.eval import metrics as M
from rec_jax.nn.sharded import AXES, SpreadScores, shard_index, sharded_top_k

# score_fn(users int[B], ends int[B]) -> f32[B, V + 1]: scores of the event after each history
# items[offsets[user]:end]; column 0 is padding and is not read. Or SpreadScores.
ScoreFn = Callable[[np.ndarray, np.ndarray], jax.Array]


@dataclass(frozen=True)
class EvalConfig:
    filter_seen: bool = True  # headline metrics leave out items of the user's own history
    ks: tuple[int, ...] = (5, 10, 20)
    bootstrap: int = 1000  # resamples behind the intervals; 0 = no intervals
    sampled_negatives: int = 0  # the SASRec paper's protocol, to reproduce its table; 0 = off
    baselines: tuple[str, ...] = ("popularity", "bigram", "item_knn")  # shown beside the model
    max_examples: int = 0  # so many are drawn, by the seed of the run; 0 = all
    batch_bytes: int = 2**25  # size of the tile of scores, [B, V + 1] f32

    def __post_init__(self):
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks={self.ks} must be positive list lengths (EvalConfig)")
        if 10 not in self.ks:
            raise ValueError(f"ks={self.ks} must hold 10, which the tables report (EvalConfig)")
        for name in ("bootstrap", "sampled_negatives", "max_examples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (off) or more (EvalConfig)")


@dataclass(frozen=True)
class Ranks:
    """Where the target of each example stands, int[E]: items above it and items level with it (itself
    included), with seen items left out (`greater`, `equal`) or in; top_EK: the best unseen (or all), 0
    where none is left."""

    greater: np.ndarray
    equal: np.ndarray
    greater_unfiltered: np.ndarray
    equal_unfiltered: np.ndarray
    top_EK: np.ndarray
    sampled_greater: np.ndarray | None = None
    sampled_equal: np.ndarray | None = None


def _count_rows(*masks_BV):
    """How often each mask holds in each row. One pass: XLA:CPU takes ten times as long over several sums."""
    zeros = (jnp.int32(0),) * len(masks_BV)
    masks_BV = tuple(mask.astype(jnp.int32) for mask in masks_BV)
    return jax.lax.reduce(masks_BV, zeros, lambda sums, more: tuple(map(jnp.add, sums, more)), (1,))


def _count(scores_BV, target_B1, is_item_V, target_B, seen_rows_P, seen_P):
    """Counts over the given columns, and which of them are unseen items. target_B, seen_P: columns; those
    beyond the array are dropped.

    Items are left out by a mask, not by a score of -inf: a model may give that score itself, and is then
    tied with its own like any other.
    """
    is_item_BV = jnp.broadcast_to(is_item_V, scores_BV.shape)
    is_unseen_BV = is_item_BV.at[seen_rows_P, seen_P].set(False, mode="drop")
    is_unseen_BV = is_unseen_BV.at[jnp.arange(len(target_B)), target_B].set(
        True, mode="drop"
    )  # also a repeat
    above_BV, level_BV = scores_BV > target_B1, scores_BV == target_B1
    counts = _count_rows(
        above_BV & is_unseen_BV,
        level_BV & is_unseen_BV,
        above_BV & is_item_BV,
        level_BV & is_item_BV,
        jnp.isnan(scores_BV) & is_item_BV,
    )
    return counts, is_unseen_BV, is_item_BV


@partial(jax.jit, static_argnames=("top_k", "filter_seen"))
def _rank(scores_BV, targets_B, seen_rows_P, seen_items_P, *, top_k, filter_seen):
    """Counts and best items of one tile. seen_*_P: padded pairs; a pair of row B is outside and dropped."""
    scores_BV = scores_BV.astype(jnp.float32)
    rows_B = jnp.arange(scores_BV.shape[0])
    target_B1 = scores_BV[rows_B, targets_B][:, None]
    is_item_V = jnp.arange(scores_BV.shape[1]) > 0
    (*counts, num_bad_B), is_unseen_BV, is_item_BV = _count(
        scores_BV, target_B1, is_item_V, targets_B, seen_rows_P, seen_items_P
    )
    is_listed_BV = is_unseen_BV if filter_seen else is_item_BV
    finite_BV = jnp.maximum(scores_BV, jnp.finfo(jnp.float32).min)  # still before what is left out
    top_BK = jax.lax.top_k(jnp.where(is_listed_BV, finite_BV, -jnp.inf), top_k)[1]
    top_BK = jnp.where(is_listed_BV[rows_B[:, None], top_BK], top_BK, 0)  # fewer than top_k are left
    return (*counts, top_BK), num_bad_B > 0


@partial(jax.jit, static_argnames=("top_k", "filter_seen"))
def _rank_spread(spread: SpreadScores, targets_B, seen_rows_P, seen_items_P, *, top_k, filter_seen):
    """The same where each device has the scores of some items: counts and the best of each travel."""
    placement = spread.placement

    def part(scores_Bv, target_B, seen_rows_P, seen_P):
        size = scores_Bv.shape[1]
        first = shard_index() * size

        def here(rows):
            return jnp.where((rows >= first) & (rows < first + size), rows - first, size)

        target_B = here(target_B)
        own_B = scores_Bv.at[jnp.arange(len(target_B)), target_B].get(mode="fill", fill_value=-jnp.inf)
        target_B1 = jax.lax.pmax(own_B, AXES)[:, None]
        is_item_v = placement.is_real(first + jnp.arange(size))
        counts, is_unseen_Bv, is_item_Bv = _count(
            scores_Bv, target_B1, is_item_v, target_B, seen_rows_P, here(seen_P)
        )
        is_listed_Bv = is_unseen_Bv if filter_seen else is_item_Bv
        finite_Bv = jnp.maximum(scores_Bv, jnp.finfo(jnp.float32).min)
        best_BK, row_BK = sharded_top_k(jnp.where(is_listed_Bv, finite_Bv, -jnp.inf), top_k)
        top_BK = jnp.where(best_BK > -jnp.inf, placement.to_ids(row_BK), 0)
        return *jax.lax.psum(counts, AXES), top_BK

    targets_B, seen_items_P = placement.to_physical(targets_B), placement.to_physical(seen_items_P)
    *counts, num_bad_B, top_BK = jax.shard_map(
        part, mesh=spread.mesh, in_specs=(P(None, AXES), P(), P(), P()), out_specs=P(), check_vma=False
    )(spread.scores_BV, targets_B, seen_rows_P, seen_items_P)
    return (*counts, top_BK), num_bad_B > 0


@jax.jit
def _rank_sampled(scores, targets_B, negatives_BK):
    mesh = None
    if isinstance(scores, SpreadScores):
        targets_B, negatives_BK = (scores.placement.to_physical(x) for x in (targets_B, negatives_BK))
        scores, mesh = scores.scores_BV, scores.mesh
    rows_B = jnp.arange(scores.shape[0])[:, None]
    chosen_BK = scores[rows_B, jnp.concatenate([targets_B[:, None], negatives_BK], axis=1)]
    if mesh is not None:  # every process is to read the counts
        chosen_BK = jax.lax.with_sharding_constraint(chosen_BK, NamedSharding(mesh, P()))
    target_B1, sampled_BK = chosen_BK[:, :1], chosen_BK[:, 1:]
    return jnp.sum(sampled_BK > target_B1, -1), 1 + jnp.sum(sampled_BK == target_B1, -1)


def rank_examples(score_fn: ScoreFn, histories, ex: Examples, config: EvalConfig, seed: int = 0) -> Ranks:
    """The exact place of every target in the whole catalogue, a tile of users at a time.

    The target is compared with scores of the same array, so ties are exact.
    Raises ValueError at a NaN score, naming the user.
    """
    num_rows = histories.num_items + 1
    size = int(np.clip(config.batch_bytes // (4 * num_rows), 1, len(ex.users)))
    top_k = min(max(config.ks), histories.num_items)
    columns = []
    for first in range(0, len(ex.users), size):
        chunk = np.arange(first, min(first + size, len(ex.users)))
        padded = np.pad(chunk, (0, size - len(chunk)), mode="edge")  # one shape, compiled once
        users, ends, targets = ex.users[padded], ex.ends[padded], ex.targets[padded]
        scores = score_fn(users, ends)
        seen = _seen_pairs(histories, users, ends)
        rank = _rank_spread if isinstance(scores, SpreadScores) else _rank
        tile, is_bad_B = rank(scores, targets, *seen, top_k=top_k, filter_seen=config.filter_seen)
        bad = np.asarray(is_bad_B)
        if bad.any():
            user = histories.user_ids[users[np.argmax(bad)]]
            raise ValueError(f"NaN among the scores of user {user}: the model or baseline is broken")
        if config.sampled_negatives:
            negatives_BK = sample_unseen(histories, users, config.sampled_negatives, seed)
            tile += _rank_sampled(scores, targets, negatives_BK)
        columns.append([np.asarray(x)[: len(chunk)] for x in tile])
    return Ranks(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _seen_pairs(histories, users, ends) -> tuple[np.ndarray, np.ndarray]:
    """(row, item) of every earlier event, padded to a power of two with rows that do not exist."""
    starts = histories.offsets[users]
    lengths = ends - starts
    total = int(lengths.sum())
    size = max(1024, 1 << (total - 1).bit_length())
    rows = np.full(size, len(users), np.int32)
    items = np.zeros(size, np.int32)
    rows[:total] = np.repeat(np.arange(len(users)), lengths)
    ends_in_list = np.cumsum(lengths)
    source = np.repeat(starts - (ends_in_list - lengths), lengths) + np.arange(total)
    items[:total] = histories.items[source]
    return rows, items


def sample_unseen(histories, users: np.ndarray, num: int, seed: int) -> np.ndarray:
    """int32[B, num] items that the user touched in no part, uniform without replacement; they depend on
    (seed, user) alone."""
    out = np.empty((len(users), num), np.int32)
    for row, user in enumerate(users):
        touched = histories.items[histories.offsets[user] : histories.offsets[user + 1]]
        is_unseen_V = np.ones(histories.num_items + 1, bool)
        is_unseen_V[0] = is_unseen_V[touched] = False
        unseen = np.flatnonzero(is_unseen_V)
        if len(unseen) < num:
            raise ValueError(
                f"sampled_negatives={num} but user {histories.user_ids[user]} has only {len(unseen)} "
                "untouched items (EvalConfig)"
            )
        out[row] = np.random.default_rng((seed, user)).choice(unseen, num, replace=False)
    return out


def evaluate(score_fn: ScoreFn, histories, split, part: str, config: EvalConfig, seed: int = 0) -> dict:
    """Every metric of one part ("val" or "test") of a split, as plain numbers.

    Headline names (`ndcg@10`) follow `config.filter_seen`; both policies are under `filtered/` and
    `unfiltered/`. `ndcg@10_ci` is the bootstrap interval. `by_history_length` and `by_popularity` break the
    headline down. `sampled100/...` appears only on request and says what it is.
    """
    ex = examples(histories, split, part)
    if len(ex.users) == 0:
        raise ValueError(f"the {part} part of the split has no example: nothing to evaluate")
    num_held_out = len(ex.users)
    if 0 < config.max_examples < num_held_out:
        drawn = np.random.default_rng(seed).choice(num_held_out, config.max_examples, replace=False)
        drawn.sort()
        ex = dataclasses.replace(ex, users=ex.users[drawn], ends=ex.ends[drawn], targets=ex.targets[drawn])
    ranks = rank_examples(score_fn, histories, ex, config, seed)
    places = {
        "filtered": (ranks.greater, ranks.equal),
        "unfiltered": (ranks.greater_unfiltered, ranks.equal_unfiltered),
    }
    result = {}
    for name, (greater, equal) in places.items():
        policy = M.rank_metrics(greater, equal, config.ks, histories.num_items)
        result |= {f"{name}/{key}": float(value.mean()) for key, value in policy.items()}
        if (name == "filtered") == config.filter_seen:
            values = policy
    result = {key: float(value.mean()) for key, value in values.items()} | result
    if config.bootstrap:
        for name in ("hr@10", "ndcg@10"):
            result[f"{name}_ci"] = M.bootstrap_interval(values[name], config.bootstrap, seed, users=ex.users)
    counts = split.train_item_counts(histories)
    shown = np.bincount(ranks.top_EK[:, :10].reshape(-1), minlength=histories.num_items + 1)
    result |= M.recommendation_metrics(shown[1:], counts[1:], 10)
    lengths = ex.ends - histories.offsets[ex.users]
    result["by_history_length"] = _breakdown(values, lengths, (5, 10, 20, 50, 100, 200))
    result["by_popularity"] = _breakdown(values, counts[ex.targets], (1, 5, 20, 100, 500))
    if config.sampled_negatives:
        sampled = M.rank_metrics(
            ranks.sampled_greater, ranks.sampled_equal, config.ks, config.sampled_negatives + 1
        )
        name = f"sampled{config.sampled_negatives}"
        result |= {f"{name}/{key}": float(value.mean()) for key, value in sampled.items()}
        result[f"{name}/warning"] = (
            "ranks against a few random items; orders models wrongly (Krichene & Rendle, KDD 2020) and is "
            "here only to reproduce the table of the SASRec paper"
        )
    result["num_examples"], result["num_held_out"] = len(ex.users), num_held_out
    result["filter_seen"] = config.filter_seen
    return result


def per_example(
    score_fn: ScoreFn, histories, split, part: str, config: EvalConfig, seed: int = 0
) -> dict[str, np.ndarray]:
    """{metric: f64[E], "users": int[E]} of all examples of a part, by the policy of `config.filter_seen`:
    what paired comparisons of models need."""
    ex = examples(histories, split, part)
    ranks = rank_examples(score_fn, histories, ex, config, seed)
    places = (ranks.greater, ranks.equal)
    if not config.filter_seen:
        places = (ranks.greater_unfiltered, ranks.equal_unfiltered)
    return {**M.rank_metrics(*places, config.ks, histories.num_items), "users": ex.users}


def _breakdown(values: dict, by: np.ndarray, bounds) -> dict[str, dict]:
    """hr@10 and ndcg@10 of the examples in each bucket low <= by < high that is not empty."""
    edges = [0, *bounds, np.inf]
    out = {}
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (by >= low) & (by < high)
        if inside.any():
            name = f">={low}" if high == np.inf else f"{low}..{high - 1}"
            out[name] = {key: float(values[key][inside].mean()) for key in ("hr@10", "ndcg@10")}
            out[name]["num_examples"] = int(inside.sum())
    return out
