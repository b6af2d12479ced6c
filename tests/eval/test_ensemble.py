import jax.numpy as jnp
import numpy as np

from rec_jax.eval.ensemble import EnsembleScorer

RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=(2, 3, 6)) * [[[1]], [[50]]] + [[[0]], [[9]]]


def scorer(scores_BV):
    def score_fn(users, ends):
        return jnp.asarray(scores_BV[users], jnp.float32).at[:, 0].set(-jnp.inf)

    score_fn.score_history = lambda items, times=None: score_fn(np.array([items[0]]), None)[0]
    return score_fn


def standardised(scores_BV):
    items = scores_BV[:, 1:]
    return (items - items.mean(1, keepdims=True)) / items.std(1, keepdims=True)


def test_the_mean_of_standardised_scores():
    ensemble = EnsembleScorer([scorer(FIRST), scorer(SECOND)])
    expected = (standardised(FIRST) + standardised(SECOND)) / 2
    got = np.asarray(ensemble(np.arange(3), np.arange(3)))
    np.testing.assert_allclose(got[:, 1:], expected, rtol=1e-4, atol=1e-5)
    assert np.all(got[:, 0] == -np.inf)
    np.testing.assert_allclose(ensemble.score_history(np.array([2]))[1:], expected[2], rtol=1e-4, atol=1e-5)


def test_scales_do_not_vote_and_constants_say_nothing():
    users = np.arange(3)
    once = EnsembleScorer([scorer(FIRST), scorer(SECOND)])(users, users)
    scaled = EnsembleScorer([scorer(FIRST), scorer(SECOND * 100 - 7)])(users, users)
    np.testing.assert_allclose(scaled[:, 1:], once[:, 1:], rtol=1e-3, atol=1e-4)
    alone = EnsembleScorer([scorer(FIRST), scorer(np.zeros((3, 6)))])(users, users)
    np.testing.assert_allclose(alone[:, 1:], standardised(FIRST) / 2, rtol=1e-4, atol=1e-5)
