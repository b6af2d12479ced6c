import numpy as np

from rec_jax.data.queries import Queries
from rec_jax.eval.ensemble import EnsembleRanker
from rec_jax.models.ranker import ScoreRanker

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=(2, 3, 6)) * [[[1]], [[50]]] + [[[0]], [[9]]]


def ranker(scores_BV):
    return ScoreRanker(lambda queries: scores_BV[queries.users].astype(np.float32))


ALL_USERS = Queries({"item": np.ones(3, np.int32)}, np.arange(3), 1 + np.arange(3), np.arange(3))


def standardised(scores_BV):
    items = scores_BV[:, 1:]
    return (items - items.mean(1, keepdims=True)) / items.std(1, keepdims=True)


def test_scores_are_the_mean_of_standardised_scores():
    ensemble = EnsembleRanker([ranker(FIRST), ranker(SECOND)])
    expected = (standardised(FIRST) + standardised(SECOND)) / 2
    scores = np.asarray(ensemble.scores(ALL_USERS).whole())
    np.testing.assert_allclose(scores[:, 1:], expected, rtol=1e-4, atol=1e-5)
    assert np.all(scores[:, 0] == -np.inf)
    alone = ensemble.scores(ALL_USERS[2:]).whole()
    np.testing.assert_allclose(alone[0, 1:], expected[2], rtol=1e-4, atol=1e-5)


def test_scales_and_constant_scores_do_not_change_the_ranking():
    plain = EnsembleRanker([ranker(FIRST), ranker(SECOND)]).scores(ALL_USERS).whole()
    scaled = EnsembleRanker([ranker(FIRST), ranker(SECOND * 100 - 7)]).scores(ALL_USERS).whole()
    np.testing.assert_allclose(scaled[:, 1:], plain[:, 1:], rtol=1e-3, atol=1e-4)
    alone = EnsembleRanker([ranker(FIRST), ranker(np.zeros((3, 6)))]).scores(ALL_USERS).whole()
    np.testing.assert_allclose(alone[:, 1:], standardised(FIRST) / 2, rtol=1e-4, atol=1e-5)
