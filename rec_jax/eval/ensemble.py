"""Several runs as one: the mean of their standardised scores."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.nn.sharded import SpreadScores


class EnsembleScorer:
    """A scorer like each of `scorers`, of the mean of their scores, which are first brought to mean 0 and
    variance 1 over the catalogue, history by history.

    The mean of log-probabilities would rank like the mean of raw scores, for the normaliser of a softmax is
    the same for all items: a run with larger scores, by its temperature or its loss, would outvote others.
    """

    def __init__(self, scorers):
        self._scorers = list(scorers)

    def __call__(self, users: np.ndarray, ends: np.ndarray) -> jax.Array:
        """f32[B, V + 1] on one device, column 0 (padding) -inf."""
        return sum(standardised(_whole(scorer(users, ends))) for scorer in self._scorers) / len(self._scorers)

    def score_history(self, items: np.ndarray, times: np.ndarray | None = None) -> jax.Array:
        """f32[V + 1]; see `SequenceScorer.score_history`."""
        each = (standardised(scorer.score_history(items, times)[None])[0] for scorer in self._scorers)
        return sum(each) / len(self._scorers)


def _whole(scores) -> jax.Array:
    if not isinstance(scores, SpreadScores):
        return scores
    whole = NamedSharding(scores.mesh, P())
    return jax.jit(SpreadScores.in_order, out_shardings=whole)(scores).addressable_data(0)


@jax.jit
def standardised(scores_BV):
    """f32[B, V + 1] with mean 0 and variance 1 over the items of each row, column 0 (padding) -inf."""
    items_BV = scores_BV[:, 1:].astype(jnp.float32)
    items_BV -= jnp.mean(items_BV, axis=1, keepdims=True)
    deviation_B1 = jnp.sqrt(jnp.mean(items_BV**2, axis=1, keepdims=True))
    items_BV /= jnp.maximum(deviation_B1, 1e-12)
    return jnp.pad(items_BV, ((0, 0), (1, 0)), constant_values=-jnp.inf)
