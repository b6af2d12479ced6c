"""Evaluation of any ranker against the whole catalogue."""

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np

from rec_jax.data.histories import Examples, examples
from rec_jax.data.queries import Queries
from rec_jax.eval import metrics as M
from rec_jax.models.baselines import check_ease
from rec_jax.models.ranker import Ranker
from rec_jax.objectives.catalogue import Ranks

_BYTES_OF_EVENT = 16  # memory per event of the histories in a tile


@dataclass(frozen=True)
class EvalConfig:
    filter_seen: bool = True  # headline metrics: rank without the items of the user's own history
    ks: tuple[int, ...] = (5, 10, 20)
    bootstrap: int = 1000  # resamples for the intervals; 0 = no intervals
    sampled_negatives: int = 0  # also rank against so many random items, as the SASRec paper does; 0 = off
    baselines: tuple[str, ...] = ("popularity", "bigram", "item_knn")  # evaluated for comparison
    max_examples: int = 0  # evaluate a random sample of this size, drawn with the run's seed; 0 = all
    batch_bytes: int = 2**25  # memory of a tile of scores, [B, V + 1] f32, and of its histories

    def __post_init__(self):
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks={self.ks} must be positive list lengths (EvalConfig)")
        if 10 not in self.ks:
            raise ValueError(f"ks={self.ks} must contain 10, which the printed tables show (EvalConfig)")
        for name in ("bootstrap", "sampled_negatives", "max_examples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (off) or positive (EvalConfig)")


def check_eval(config: EvalConfig, histories, split, seed: int = 0) -> None:
    """Raises each ValueError that a later evaluation of the val or test part would raise, so that a
    training that cannot be evaluated is refused before its first step."""
    for part in ("val", "test"):
        ex = _drawn(_held_out(histories, split, part), config.max_examples, seed)
        if config.sampled_negatives:
            _check_sampled(histories, ex.users, config.sampled_negatives)
    if "ease" in config.baselines:
        check_ease(histories.num_items)


def _held_out(histories, split, part: str) -> Examples:
    ex = examples(histories, split, part)
    if len(ex.users) == 0:
        raise ValueError(f"the {part} part of the split has no example to evaluate: set another data.split")
    return ex


def _drawn(ex: Examples, num: int, seed: int) -> Examples:
    """Draws `num` of the examples and keeps their order. Returns all examples if `num` is 0 or too large."""
    if not 0 < num < len(ex.users):
        return ex
    drawn = np.sort(np.random.default_rng(seed).choice(len(ex.users), num, replace=False))
    return dataclasses.replace(ex, users=ex.users[drawn], ends=ex.ends[drawn], targets=ex.targets[drawn])


def rank_examples(ranker: Ranker, histories, ex: Examples, config: EvalConfig, seed: int = 0) -> Ranks:
    """Returns the exact rank of every target in the whole catalogue, as NumPy arrays.

    Ranks one tile of examples at a time, which bounds memory for any lengths of histories.

    Raises ValueError for a NaN score, naming the user.
    """
    if config.sampled_negatives:
        _check_sampled(histories, ex.users, config.sampled_negatives)
    queries = Queries.of(histories, ex.users, ex.ends)
    max_rows = config.batch_bytes // (4 * (histories.num_items + 1))
    tiles = list(queries.tiles(max_rows, config.batch_bytes // _BYTES_OF_EVENT))
    size = max(map(len, tiles))
    top_k = min(max(config.ks), histories.num_items)
    parts = []
    for tile in tiles:
        padded = np.pad(tile, (0, size - len(tile)), mode="edge")  # one shape, compiled once
        sampled = None
        if config.sampled_negatives:
            sampled = sample_unseen(histories, ex.users[padded], config.sampled_negatives, seed)
        ranks = ranker.rank(
            queries[padded],
            ex.targets[padded],
            top_k=top_k,
            filter_seen=config.filter_seen,
            sampled_ids=sampled,
        )
        ranks = jax.tree.map(lambda x: np.asarray(x)[: len(tile)], ranks)  # noqa: B023
        if ranks.num_nan.any():
            user = histories.user_ids[ex.users[tile[np.argmax(ranks.num_nan > 0)]]]
            raise ValueError(f"NaN among the scores of user {user}: the model or baseline is broken")
        parts.append(ranks)
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _check_sampled(histories, users: np.ndarray, num: int) -> None:
    """Raises ValueError if a user has fewer than `num` unseen items (items in none of their events)."""
    queries = Queries.of(histories, np.unique(users))
    for tile in queries.tiles(len(queries), 2**22):
        num_left = histories.num_items - np.bincount(queries[tile].seen()[0])
        if (num_left < num).any():
            first = np.argmax(num_left < num)
            raise ValueError(
                f"sampled_negatives={num} but user {histories.user_ids[queries.users[tile[first]]]} has only "
                f"{num_left[first]} unseen items: lower it, or set it to 0 (EvalConfig)"
            )


def sample_unseen(histories, users: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Draws items int32[B, num] that are in none of the user's events, of any part: uniformly, without
    replacement. They depend only on (seed, user)."""
    out = np.empty((len(users), num), np.int32)
    for row, user in enumerate(users):
        seen = histories.items[histories.offsets[user] : histories.offsets[user + 1]]
        is_unseen_V = np.ones(histories.num_items + 1, bool)
        is_unseen_V[0] = is_unseen_V[seen] = False
        unseen = np.flatnonzero(is_unseen_V)
        out[row] = np.random.default_rng((seed, user)).choice(unseen, num, replace=False)
    return out


def evaluate(ranker: Ranker, histories, split, part: str, config: EvalConfig, seed: int = 0) -> dict:
    """Returns every metric of one part ("val" or "test") of a split, as plain numbers.

    The headline metrics (`ndcg@10`) follow `config.filter_seen`; those with a prefix, `filtered/` and
    `unfiltered/`, are given for both policies. `ndcg@10_ci` is the bootstrap interval. `by_history_length`
    and `by_popularity` break the headline metrics down. `sampled100/...` is present only if
    config.sampled_negatives is set, with a warning. `untrained_items` is the number of items without a
    training event, which are ranked like all others; `untrained@10` is their share of all top-10
    recommendations.
    """
    held_out = _held_out(histories, split, part)
    ex = _drawn(held_out, config.max_examples, seed)
    ranks = rank_examples(ranker, histories, ex, config, seed)
    policies = {
        "filtered": (ranks.greater, ranks.equal),
        "unfiltered": (ranks.greater_unfiltered, ranks.equal_unfiltered),
    }
    result = {}
    for name, (greater, equal) in policies.items():
        metrics = M.rank_metrics(greater, equal, config.ks, histories.num_items)
        result |= {f"{name}/{key}": float(value.mean()) for key, value in metrics.items()}
        if (name == "filtered") == config.filter_seen:
            values = metrics
    result = {key: float(value.mean()) for key, value in values.items()} | result
    if config.bootstrap:
        for name in ("hr@10", "ndcg@10"):
            result[f"{name}_ci"] = M.bootstrap_interval(values[name], config.bootstrap, seed, users=ex.users)
    counts = split.train_item_counts(histories)
    shown = np.bincount(ranks.top_BK[:, :10].reshape(-1), minlength=histories.num_items + 1)
    result |= M.recommendation_metrics(shown[1:], counts[1:], 10)
    is_untrained = counts[1:] == 0
    result["untrained_items"] = int(is_untrained.sum())
    result["untrained@10"] = float(shown[1:][is_untrained].sum() / max(1, shown[1:].sum()))
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
            "ranks against a few random items only; such metrics can order models wrongly (Krichene & "
            "Rendle, KDD 2020): use them only to compare with the table of the SASRec paper"
        )
    result["num_examples"], result["num_held_out"] = len(ex.users), len(held_out.users)
    result["filter_seen"] = config.filter_seen
    return result


def per_example(
    ranker: Ranker, histories, split, part: str, config: EvalConfig, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns {metric: f64[E], "users": int[E]} of all examples of a part, under the policy of
    `config.filter_seen`, for paired comparisons of models."""
    ex = _held_out(histories, split, part)
    ranks = rank_examples(ranker, histories, ex, dataclasses.replace(config, sampled_negatives=0), seed)
    greater, equal = ranks.greater, ranks.equal
    if not config.filter_seen:
        greater, equal = ranks.greater_unfiltered, ranks.equal_unfiltered
    return {**M.rank_metrics(greater, equal, config.ks, histories.num_items), "users": ex.users}


def _breakdown(values: dict, by: np.ndarray, bounds) -> dict[str, dict]:
    """Returns hr@10 and ndcg@10 of the examples in each nonempty bucket low <= by < high."""
    edges = [0, *bounds, np.inf]
    out = {}
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (by >= low) & (by < high)
        if inside.any():
            name = f">={low}" if high == np.inf else f"{low}..{high - 1}"
            out[name] = {key: float(values[key][inside].mean()) for key in ("hr@10", "ndcg@10")}
            out[name]["num_examples"] = int(inside.sum())
    return out
