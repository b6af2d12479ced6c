import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_jax.eval import metrics as M


def slow(metric, greater, equal):
    """The mean of metric(rank) over the tied ranks."""
    return np.mean([metric(rank) for rank in range(greater + 1, greater + equal + 1)])


def test_metrics_match_values_computed_by_hand():
    greater, equal = np.array([0, 2, 10]), np.array([1, 1, 1])
    np.testing.assert_allclose(M.hit_rate(greater, equal, 10), [1, 1, 0])
    np.testing.assert_allclose(M.ndcg(greater, equal, 10), [1, 0.5, 0])  # 1 / log2(4) = 0.5
    np.testing.assert_allclose(M.reciprocal_rank(greater, equal, 100), [1, 1 / 3, 1 / 11])
    np.testing.assert_allclose(M.mean_rank(greater, equal), [1, 3, 11])


def test_a_tie_across_the_cutoff_counts_in_part():
    # Ranks 10 and 11 are tied: one of two orders is a hit.
    assert M.hit_rate(np.array([9]), np.array([2]), 10)[0] == 0.5
    assert M.ndcg(np.array([9]), np.array([2]), 10)[0] == pytest.approx(0.5 / math.log2(11))


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 30))
def test_a_tie_gives_the_mean_over_its_ranks(greater, equal, k):
    g, e = np.array([greater]), np.array([equal])
    assert M.hit_rate(g, e, k)[0] == pytest.approx(slow(lambda rank: rank <= k, greater, equal))
    expected = slow(lambda rank: (rank <= k) / math.log2(1 + rank), greater, equal)
    assert M.ndcg(g, e, k)[0] == pytest.approx(expected)
    expected = slow(lambda rank: (rank <= k) / rank, greater, equal)
    assert M.reciprocal_rank(g, e, k)[0] == pytest.approx(expected)


def test_bootstrap_interval_is_reproducible_and_has_the_normal_width():
    values = np.random.default_rng(0).normal(5, 2, 4000)
    low, high = M.bootstrap_interval(values, 1000, seed=1)
    assert [low, high] == M.bootstrap_interval(values, 1000, seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(4000), rel=0.1)


def test_recommendation_metrics_of_even_and_concentrated_lists():
    counts = np.array([7, 5, 3, 1])
    even = M.recommendation_metrics(np.array([2, 2, 2, 2]), counts, 10)
    assert even == {"coverage@10": 1.0, "gini@10": 0.0, "popularity@10": 4.0}
    one = M.recommendation_metrics(np.array([8, 0, 0, 0]), counts, 10)
    assert one == {"coverage@10": 0.25, "gini@10": 0.75, "popularity@10": 7.0}


def test_bootstrap_ratio_has_no_width_if_all_pairs_have_the_same_ratio():
    values = np.random.default_rng(0).uniform(size=200)
    ratio, interval = M.bootstrap_ratio(0.9 * values, values, 200, seed=0)
    np.testing.assert_allclose([ratio, *interval], 0.9)
    low, high = M.bootstrap_ratio(values[::-1], values, 200, seed=0)[1]
    assert low < 0.95 and high > 1.05


def test_paired_test_counts_the_swaps_with_a_difference_as_large():
    # Two of the 8 ways to swap three differences of 1 give a mean difference of 1: swap none, or swap all.
    p = M.paired_test([1, 2, 3], [0, 1, 2], num=20_000, seed=0)
    assert p == pytest.approx(2 / 8, abs=0.015)
    assert M.paired_test([1, 2, 3], [1, 2, 3], num=100, seed=0) == 1
    rng = np.random.default_rng(0)
    noise = rng.normal(size=2_000)
    assert M.paired_test(noise + 0.2 + 0.5 * rng.normal(size=2_000), noise, num=500, seed=0) < 0.01


def test_events_of_one_user_are_resampled_and_swapped_together():
    # Three users, one of them with 100 events: equivalent to three examples with these weights.
    users, values = np.repeat([7, 8, 9], [100, 1, 1]), np.repeat([1.0, 0.0, 0.5], [100, 1, 1])
    p = M.paired_test(values, np.zeros(102), num=20_000, seed=0, users=users)
    assert p == pytest.approx(4 / 8, abs=0.015)  # those where users 7 and 9 are both swapped or both not
    low, high = M.bootstrap_interval(values, 2000, seed=0, users=users)
    assert low < 0.3 and high == 1  # the first user is not drawn in 8 of 27 times
    assert M.bootstrap_interval(values, 2000, seed=0)[0] > 0.95
    ratio, (low, high) = M.bootstrap_ratio(values, 2 * values, 200, seed=0, users=users)
    assert ratio == 0.5
