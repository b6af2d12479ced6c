"""Ranking metrics from the rank of one target in the whole catalogue.

Each example has one target: the next event. `greater` items score higher than the target, and `equal` items
score the same, including the target. Its rank is therefore one of greater + 1, ..., greater + equal. Every
metric is the expectation over a random order of the tied items, so constant scores get exactly chance level.
With one target per example, recall@k is the hit rate, precision@k is the hit rate / k, and MAP@k is the
reciprocal rank cut off at k.
"""

import numpy as np


def hit_rate(greater, equal, k: int) -> np.ndarray:
    """P(rank <= k), f64[E]. greater, equal: int[E], equal >= 1."""
    return np.clip(k - np.asarray(greater, np.float64), 0, equal) / equal


def ndcg(greater, equal, k: int) -> np.ndarray:
    """The expectation of 1 / log2(1 + rank) if rank <= k, else 0. Source: Jarvelin & Kekalainen 2002; with
    one target the ideal gain is 1."""
    return _mean_gain(1 / np.log2(np.arange(2, k + 2)), greater, equal)


def reciprocal_rank(greater, equal, k: int) -> np.ndarray:
    """The expectation of 1 / rank if rank <= k, else 0."""
    return _mean_gain(1 / np.arange(1, k + 1), greater, equal)


def mean_rank(greater, equal) -> np.ndarray:
    """The expected rank, counted from 1."""
    return np.asarray(greater) + (np.asarray(equal) + 1) / 2


def _mean_gain(gains: np.ndarray, greater, equal) -> np.ndarray:
    """The mean gain over the tied ranks. `gains[i]` is that of rank i + 1; later ranks have gain 0."""
    total = np.concatenate([[0.0], np.cumsum(gains)])
    last = len(gains)
    first_tied = np.minimum(greater, last)
    last_tied = np.minimum(np.asarray(greater) + equal, last)
    return (total[last_tied] - total[first_tied]) / equal


def rank_metrics(greater, equal, ks, num_items: int) -> dict[str, np.ndarray]:
    """Returns {name: f64[E]}, every metric of each example. `mrr` uses all ranks, without a cutoff."""
    values = {}
    for k in ks:
        hits = hit_rate(greater, equal, k)
        values[f"hr@{k}"] = values[f"recall@{k}"] = hits
        values[f"precision@{k}"] = hits / k
        values[f"ndcg@{k}"] = ndcg(greater, equal, k)
        values[f"map@{k}"] = reciprocal_rank(greater, equal, k)
    values["mrr"] = reciprocal_rank(greater, equal, num_items)
    values["mean_rank"] = mean_rank(greater, equal)
    return values


def _sum_by_user(values, users) -> np.ndarray:
    """Returns f64[U], the sum of values over the examples of each user, which are not independent.

    users: int[E], or None if every example has a different user.
    """
    values = np.asarray(values, np.float64)
    if users is None or len(np.unique(users)) == len(values):
        return values
    return np.bincount(np.unique(users, return_inverse=True)[1], values)


def bootstrap_interval(
    values: np.ndarray, num: int, seed: int, level: float = 0.95, users=None
) -> list[float]:
    """Percentile bootstrap interval [low, high] of the mean over examples. Users are resampled, each with all
    of their examples.

    values: f64[E]. num: number of resamples. users: int[E], the user of each example; None = all different.
    Source: Efron 1979.
    """
    sums_U, counts_U = _sum_by_user(values, users), _sum_by_user(np.ones(len(values)), users)
    rng = np.random.default_rng(seed)
    means = np.empty(num)
    for i in range(num):
        drawn = rng.integers(0, len(sums_U), len(sums_U))
        means[i] = sums_U[drawn].sum() / counts_U[drawn].sum()
    tail = (1 - level) / 2
    return [float(x) for x in np.quantile(means, [tail, 1 - tail])]


def bootstrap_ratio(
    values, reference, num: int, seed: int, level: float = 0.95, users=None
) -> tuple[float, list[float]]:
    """Returns (mean of values / mean of reference, percentile bootstrap interval of this ratio).

    Both values of an example are resampled together, so that examples that are hard for both models do not
    widen the interval.

    values, reference: f64[E], of the same examples. users: as in `bootstrap_interval`.
    """
    sums_U, others_U = _sum_by_user(values, users), _sum_by_user(reference, users)
    rng = np.random.default_rng(seed)
    ratios = np.empty(num)
    for i in range(num):
        drawn = rng.integers(0, len(sums_U), len(sums_U))
        ratios[i] = sums_U[drawn].mean() / max(others_U[drawn].mean(), 1e-12)
    tail = (1 - level) / 2
    interval = [float(x) for x in np.quantile(ratios, [tail, 1 - tail])]
    return float(sums_U.mean() / max(others_U.mean(), 1e-12)), interval


def paired_test(values, others, num: int, seed: int, users=None) -> float:
    """Two-sided p-value of the mean difference of two models, under random swaps of the models for each user.

    It is the probability that two equally good models differ as much as observed, by the choice of users. It
    does not account for the variation over training seeds.

    values, others: f64[E], of the same examples. num: number of random swaps of all users. users: as in
    `bootstrap_interval`. Source: Fisher's randomization test, as in Smucker, Allan & Carterette, CIKM'07.
    """
    difference_U = _sum_by_user(np.subtract(values, others, dtype=np.float64), users)
    observed = abs(difference_U.sum()) * (1 - 1e-9)  # a sum that equals it up to rounding counts
    rng = np.random.default_rng(seed)
    num_extreme = 0
    for _ in range(num):
        signs = rng.integers(0, 2, len(difference_U)) * 2 - 1
        num_extreme += abs((signs * difference_U).sum()) >= observed
    return (num_extreme + 1) / (num + 1)


def recommendation_metrics(times_shown_V: np.ndarray, train_counts_V: np.ndarray, k: int) -> dict:
    """Metrics of all lists of k recommendations together.

    times_shown_V: int[V], how often each item was recommended. train_counts_V: int[V], its training events.
    Both without the padding id.

    Returns the coverage (share of the catalogue that was recommended at least once), the Gini coefficient of
    the recommendations (0 = all items equally often, near 1 = always the same few items), and the mean
    training count of the recommended items.
    """
    shown = np.sort(times_shown_V.astype(np.float64))
    num, total = len(shown), max(1.0, shown.sum())
    gini = float((2 * np.arange(1, num + 1) - num - 1) @ shown / (num * total))
    return {
        f"coverage@{k}": float((shown > 0).mean()),
        f"gini@{k}": gini,
        f"popularity@{k}": float(times_shown_V @ train_counts_V / total),
    }
