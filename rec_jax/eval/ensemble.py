"""Ensembles of runs: the mean of their standardised scores."""

import jax
import jax.numpy as jnp

from rec_jax.data.queries import Queries
from rec_jax.models.ranker import ScoreRanker
from rec_jax.objectives.catalogue import Scores


class EnsembleRanker(ScoreRanker):
    """Ranks by the mean of several rankers' scores. For each history, the scores of a ranker are first
    standardised to mean 0 and variance 1 over the catalogue.

    The mean of log-probabilities would rank like the mean of raw scores, because the normaliser of a softmax
    is the same for all items. A run with larger scores, due to its temperature or loss, would then dominate.
    """

    def __init__(self, rankers):
        self._rankers = list(rankers)

    def scores(self, queries: Queries) -> Scores:
        each = (_standardised(ranker.scores(queries).whole()) for ranker in self._rankers)
        return Scores(sum(each) / len(self._rankers))


@jax.jit
def _standardised(scores_BV):
    items_BV = scores_BV[:, 1:].astype(jnp.float32)
    items_BV -= jnp.mean(items_BV, axis=1, keepdims=True)
    deviation_B1 = jnp.sqrt(jnp.mean(items_BV**2, axis=1, keepdims=True))
    items_BV /= jnp.maximum(deviation_B1, 1e-12)
    return jnp.pad(items_BV, ((0, 0), (1, 0)), constant_values=-jnp.inf)
