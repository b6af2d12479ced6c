import numpy as np

from rec_jax.data.queries import Queries
from rec_jax.eval.ensemble import EnsembleRanker
from rec_jax.models.ranker import ScoreRanker

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=(2, 3, 6)) * [[[1]], [[50]]] + [[[0]], [[9]]]


def ranker(scores_BV):
    return ScoreRanker(lambda queries: scores_BV[queries.users].astype(np.float32))


EVERYONE = Queries({"item": np.ones(3, np.int32)}, np.arange(3), 1 + np.arange(3), np.arange(3))


def standardised(scores_BV):
    items = scores_BV[:, 1:]
    return (items - items.mean(1, keepdims=True)) / items.std(1, keepdims=True)


def test_the_mean_of_standardised_scores():
    ensemble = EnsembleRanker([ranker(FIRST), ranker(SECOND)])
    expected = (standardised(FIRST) + standardised(SECOND)) / 2
    got = np.asarray(ensemble.scores(EVERYONE).whole())
    np.testing.assert_allclose(got[:, 1:], expected, rtol=1e-4, atol=1e-5)
    assert np.all(got[:, 0] == -np.inf)
    alone = ensemble.scores(EVERYONE[2:]).whole()
    np.testing.assert_allclose(alone[0, 1:], expected[2], rtol=1e-4, atol=1e-5)


def test_scales_do_not_vote_and_constants_say_nothing():
    once = EnsembleRanker([ranker(FIRST), ranker(SECOND)]).scores(EVERYONE).whole()
    scaled = EnsembleRanker([ranker(FIRST), ranker(SECOND * 100 - 7)]).scores(EVERYONE).whole()
    np.testing.assert_allclose(scaled[:, 1:], once[:, 1:], rtol=1e-3, atol=1e-4)
    alone = EnsembleRanker([ranker(FIRST), ranker(np.zeros((3, 6)))]).scores(EVERYONE).whole()
    np.testing.assert_allclose(alone[:, 1:], standardised(FIRST) / 2, rtol=1e-4, atol=1e-5)
