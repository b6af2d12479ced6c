"""Full-catalogue evaluation of any ranker."""

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

_BYTES_OF_EVENT = 16  # of a history in a tile, about as much as a few scores


@dataclass(frozen=True)
class EvalConfig:
    filter_seen: bool = True  # headline metrics leave out items of the user's own history
    ks: tuple[int, ...] = (5, 10, 20)
    bootstrap: int = 1000  # resamples behind the intervals; 0 = no intervals
    sampled_negatives: int = 0  # the SASRec paper's protocol, to reproduce its table; 0 = off
    baselines: tuple[str, ...] = ("popularity", "bigram", "item_knn")  # shown beside the model
    max_examples: int = 0  # so many are drawn, by the seed of the run; 0 = all
    batch_bytes: int = 2**25  # size of a tile of scores, [B, V + 1] f32, and of its histories

    def __post_init__(self):
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks={self.ks} must be positive list lengths (EvalConfig)")
        if 10 not in self.ks:
            raise ValueError(f"ks={self.ks} must hold 10, which the tables report (EvalConfig)")
        for name in ("bootstrap", "sampled_negatives", "max_examples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (off) or more (EvalConfig)")


def check_eval(config: EvalConfig, histories, split, seed: int = 0) -> None:
    """Raises every ValueError that a later evaluation of either part would raise, so that a training that
    cannot be evaluated is refused before its first step."""
    for part in ("val", "test"):
        ex = _drawn(_held_out(histories, split, part), config.max_examples, seed)
        if config.sampled_negatives:
            _check_sampled(histories, ex.users, config.sampled_negatives)
    if "ease" in config.baselines:
        check_ease(histories.num_items)


def _held_out(histories, split, part: str) -> Examples:
    ex = examples(histories, split, part)
    if len(ex.users) == 0:
        raise ValueError(f"the {part} part of the split has no example: nothing to evaluate")
    return ex


def _drawn(ex: Examples, num: int, seed: int) -> Examples:
    """`num` of the examples in their order, or all where that is 0 or more than there are."""
    if not 0 < num < len(ex.users):
        return ex
    drawn = np.sort(np.random.default_rng(seed).choice(len(ex.users), num, replace=False))
    return dataclasses.replace(ex, users=ex.users[drawn], ends=ex.ends[drawn], targets=ex.targets[drawn])


def rank_examples(ranker: Ranker, histories, ex: Examples, config: EvalConfig, seed: int = 0) -> Ranks:
    """The exact place of every target in the whole catalogue, as NumPy arrays; a tile of examples at a time,
    which bounds memory whatever the histories.

    Raises ValueError at a NaN score, naming the user.
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
    """Raises ValueError for a user with fewer than `num` items that they touched in no part."""
    queries = Queries.of(histories, np.unique(users))
    for tile in queries.tiles(len(queries), 2**22):
        num_left = histories.num_items - np.bincount(queries[tile].seen()[0])
        if (num_left < num).any():
            first = np.argmax(num_left < num)
            raise ValueError(
                f"sampled_negatives={num} but user {histories.user_ids[queries.users[tile[first]]]} has only "
                f"{num_left[first]} untouched items: lower it, or set it to 0 (EvalConfig)"
            )


def sample_unseen(histories, users: np.ndarray, num: int, seed: int) -> np.ndarray:
    """int32[B, num] items that the user touched in no part, uniform without replacement; they depend on
    (seed, user) alone."""
    out = np.empty((len(users), num), np.int32)
    for row, user in enumerate(users):
        touched = histories.items[histories.offsets[user] : histories.offsets[user + 1]]
        is_unseen_V = np.ones(histories.num_items + 1, bool)
        is_unseen_V[0] = is_unseen_V[touched] = False
        unseen = np.flatnonzero(is_unseen_V)
        out[row] = np.random.default_rng((seed, user)).choice(unseen, num, replace=False)
    return out


def evaluate(ranker: Ranker, histories, split, part: str, config: EvalConfig, seed: int = 0) -> dict:
    """Every metric of one part ("val" or "test") of a split, as plain numbers.

    Headline names (`ndcg@10`) follow `config.filter_seen`; both policies are under `filtered/` and
    `unfiltered/`. `ndcg@10_ci` is the bootstrap interval. `by_history_length` and `by_popularity` break the
    headline down. `sampled100/...` appears only on request and says what it is. `untrained_items` of the
    catalogue have no training event; they are ranked like others, and get the share `untrained@10` of the
    places of all top-10 lists.
    """
    everything = _held_out(histories, split, part)
    ex = _drawn(everything, config.max_examples, seed)
    ranks = rank_examples(ranker, histories, ex, config, seed)
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
            "ranks against a few random items; orders models wrongly (Krichene & Rendle, KDD 2020) and is "
            "here only to reproduce the table of the SASRec paper"
        )
    result["num_examples"], result["num_held_out"] = len(ex.users), len(everything.users)
    result["filter_seen"] = config.filter_seen
    return result


def per_example(
    ranker: Ranker, histories, split, part: str, config: EvalConfig, seed: int = 0
) -> dict[str, np.ndarray]:
    """{metric: f64[E], "users": int[E]} of all examples of a part, by the policy of `config.filter_seen`:
    what paired comparisons of models need."""
    ex = _held_out(histories, split, part)
    ranks = rank_examples(ranker, histories, ex, dataclasses.replace(config, sampled_negatives=0), seed)
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
