import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_jax.eval import metrics as M


def slow(metric, greater, equal):
    """The mean of metric(place) over the tied places."""
    return np.mean([metric(place) for place in range(greater + 1, greater + equal + 1)])


def test_hand_computed_without_ties():
    greater, equal = np.array([0, 2, 10]), np.array([1, 1, 1])
    np.testing.assert_allclose(M.hit_rate(greater, equal, 10), [1, 1, 0])
    np.testing.assert_allclose(M.ndcg(greater, equal, 10), [1, 0.5, 0])  # 1 / log2(4) = 0.5
    np.testing.assert_allclose(M.reciprocal_rank(greater, equal, 100), [1, 1 / 3, 1 / 11])
    np.testing.assert_allclose(M.mean_rank(greater, equal), [1, 3, 11])


def test_hand_computed_tie_across_the_cut():
    # Places 10 and 11 are tied: one order of two is a hit.
    assert M.hit_rate(np.array([9]), np.array([2]), 10)[0] == 0.5
    assert M.ndcg(np.array([9]), np.array([2]), 10)[0] == pytest.approx(0.5 / math.log2(11))


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 30))
def test_ties_are_the_mean_over_places(greater, equal, k):
    g, e = np.array([greater]), np.array([equal])
    assert M.hit_rate(g, e, k)[0] == pytest.approx(slow(lambda p: p <= k, greater, equal))
    expected = slow(lambda p: (p <= k) / math.log2(1 + p), greater, equal)
    assert M.ndcg(g, e, k)[0] == pytest.approx(expected)
    expected = slow(lambda p: (p <= k) / p, greater, equal)
    assert M.reciprocal_rank(g, e, k)[0] == pytest.approx(expected)


def test_bootstrap_interval_is_seeded_and_of_the_right_width():
    values = np.random.default_rng(0).normal(5, 2, 4000)
    low, high = M.bootstrap_interval(values, 1000, seed=1)
    assert [low, high] == M.bootstrap_interval(values, 1000, seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(4000), rel=0.1)


def test_recommendation_metrics():
    counts = np.array([7, 5, 3, 1])
    even = M.recommendation_metrics(np.array([2, 2, 2, 2]), counts, 10)
    assert even == {"coverage@10": 1.0, "gini@10": 0.0, "popularity@10": 4.0}
    one = M.recommendation_metrics(np.array([8, 0, 0, 0]), counts, 10)
    assert one == {"coverage@10": 0.25, "gini@10": 0.75, "popularity@10": 7.0}


def test_a_ratio_of_pairs_is_certain_where_each_keeps_the_same_share():
    values = np.random.default_rng(0).uniform(size=200)
    ratio, interval = M.bootstrap_ratio(0.9 * values, values, 200, seed=0)
    np.testing.assert_allclose([ratio, *interval], 0.9)
    low, high = M.bootstrap_ratio(values[::-1], values, 200, seed=0)[1]
    assert low < 0.95 and high > 1.05


def test_a_paired_test_counts_swaps_that_part_as_far():
    # Of the 8 ways to swap three differences of 1, two part the means by 1: all kept, or all swapped.
    p = M.paired_test([1, 2, 3], [0, 1, 2], num=20_000, seed=0)
    assert p == pytest.approx(2 / 8, abs=0.015)
    assert M.paired_test([1, 2, 3], [1, 2, 3], num=100, seed=0) == 1
    rng = np.random.default_rng(0)
    noise = rng.normal(size=2_000)
    assert M.paired_test(noise + 0.2 + 0.5 * rng.normal(size=2_000), noise, num=500, seed=0) < 0.01


def test_events_of_one_user_are_drawn_and_swapped_together():
    # Three users, one of them with 100 events: as if there were three examples, of these weights.
    users, values = np.repeat([7, 8, 9], [100, 1, 1]), np.repeat([1.0, 0.0, 0.5], [100, 1, 1])
    p = M.paired_test(values, np.zeros(102), num=20_000, seed=0, users=users)
    assert p == pytest.approx(4 / 8, abs=0.015)  # the signs of the first and the last user decide
    low, high = M.bootstrap_interval(values, 2000, seed=0, users=users)
    assert low < 0.3 and high == 1  # the first user is not drawn in 8 of 27 times
    assert M.bootstrap_interval(values, 2000, seed=0)[0] > 0.95
    ratio, (low, high) = M.bootstrap_ratio(values, 2 * values, 200, seed=0, users=users)
    assert ratio == 0.5
