"""Ranking metrics from the place of one target in the whole catalogue.

Each example has one target: the next event. `greater` items score above it and `equal` score the same,
the target included, so its place is one of greater + 1 .. greater + equal. Every metric is the expectation
over a random order of these places, which favours nobody: constant scores get exactly chance level.
With one target an example, recall@k is the hit rate, precision@k is hit rate / k, and MAP@k is the
reciprocal rank cut at k.
"""

import numpy as np


def hit_rate(greater, equal, k: int) -> np.ndarray:
    """P(place <= k), f64[E]. greater, equal: int[E], equal >= 1."""
    return np.clip(k - np.asarray(greater, np.float64), 0, equal) / equal


def ndcg(greater, equal, k: int) -> np.ndarray:
    """E[1 / log2(1 + place)] where place <= k, else 0. Source: Jarvelin & Kekalainen 2002; with one
    target the ideal gain is 1."""
    return _mean_gain(1 / np.log2(np.arange(2, k + 2)), greater, equal)


def reciprocal_rank(greater, equal, k: int) -> np.ndarray:
    """E[1 / place] where place <= k, else 0."""
    return _mean_gain(1 / np.arange(1, k + 1), greater, equal)


def mean_rank(greater, equal) -> np.ndarray:
    """The mean place, counted from 1."""
    return np.asarray(greater) + (np.asarray(equal) + 1) / 2


def _mean_gain(gain_at_place: np.ndarray, greater, equal) -> np.ndarray:
    """The mean of the gain over the tied places; `gain_at_place[i]` is for place i + 1, 0 beyond."""
    total = np.concatenate([[0.0], np.cumsum(gain_at_place)])
    last = len(gain_at_place)
    first_tied = np.minimum(greater, last)
    last_tied = np.minimum(np.asarray(greater) + equal, last)
    return (total[last_tied] - total[first_tied]) / equal


def rank_metrics(greater, equal, ks, num_items: int) -> dict[str, np.ndarray]:
    """Per-example values of every metric, name -> f64[E]. `mrr` runs over the whole catalogue."""
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


def _of_users(values, users) -> np.ndarray:
    """f64[U]: sums over the examples of each user, whose events are not independent of each other. users:
    int[E], or None where each example is another user's."""
    values = np.asarray(values, np.float64)
    if users is None or len(np.unique(users)) == len(values):
        return values
    return np.bincount(np.unique(users, return_inverse=True)[1], values)


def bootstrap_interval(
    values: np.ndarray, num: int, seed: int, level: float = 0.95, users=None
) -> list[float]:
    """Percentile bootstrap interval of the mean over examples, [low, high]; users are drawn, each with all
    of its examples.

    values: f64[E]. num: resamples. users: int[E], whose the examples are; None = all different.
    Source: Efron 1979.
    """
    sums_U, counts_U = _of_users(values, users), _of_users(np.ones(len(values)), users)
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
    """(mean of values / mean of reference, its percentile bootstrap interval). Pairs are drawn together, so
    that what is hard for both does not widen the interval.

    values, reference: f64[E], of the same examples. users: as in `bootstrap_interval`.
    """
    sums_U, others_U = _of_users(values, users), _of_users(reference, users)
    rng = np.random.default_rng(seed)
    ratios = np.empty(num)
    for i in range(num):
        drawn = rng.integers(0, len(sums_U), len(sums_U))
        ratios[i] = sums_U[drawn].mean() / max(others_U[drawn].mean(), 1e-12)
    tail = (1 - level) / 2
    interval = [float(x) for x in np.quantile(ratios, [tail, 1 - tail])]
    return float(sums_U.mean() / max(others_U.mean(), 1e-12)), interval


def paired_test(values, others, num: int, seed: int, users=None) -> float:
    """Two-sided p of the mean difference under random swaps of the two models, user by user: how often
    chance in which users there are would set two equal models so far apart. It knows nothing of seeds.

    values, others: f64[E], of the same examples. num: random swaps of all pairs. users: as in
    `bootstrap_interval`. Source: Fisher's randomization test, as in Smucker, Allan & Carterette, CIKM'07.
    """
    difference_U = _of_users(np.subtract(values, others, dtype=np.float64), users)
    observed = abs(difference_U.sum()) * (1 - 1e-9)  # what is equal but for rounding is as far
    rng = np.random.default_rng(seed)
    num_as_far = 0
    for _ in range(num):
        signs = rng.integers(0, 2, len(difference_U)) * 2 - 1
        num_as_far += abs((signs * difference_U).sum()) >= observed
    return (num_as_far + 1) / (num + 1)


def recommendation_metrics(times_shown_V: np.ndarray, train_counts_V: np.ndarray, k: int) -> dict:
    """What the lists of k recommendations look like as a whole.

    times_shown_V, train_counts_V: int[V], without the padding row: how often an item was recommended,
    and how many training events it has.
    Returns coverage (share of the catalogue ever shown), the Gini coefficient of the showings (0 = all
    items equally often, towards 1 = always the same few), and the mean training count of what was shown.
    """
    shown = np.sort(times_shown_V.astype(np.float64))
    num, total = len(shown), max(1.0, shown.sum())
    gini = float((2 * np.arange(1, num + 1) - num - 1) @ shown / (num * total))
    return {
        f"coverage@{k}": float((shown > 0).mean()),
        f"gini@{k}": gini,
        f"popularity@{k}": float(times_shown_V @ train_counts_V / total),
    }
