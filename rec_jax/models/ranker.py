"""Rankers, which rank items as the next event of a history: sequence models, baselines, ensembles, the
simulator's oracle."""

from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from rec_jax.data.queries import Queries
from rec_jax.objectives.catalogue import Ranks, Scores


class Ranker(Protocol):
    """The interface that evaluation and recommendation use. If there are several processes, all of them must
    make the same calls."""

    def rank(
        self, queries: Queries, targets: np.ndarray, *, top_k: int, filter_seen: bool = True, sampled_ids=None
    ) -> Ranks:
        """Returns the exact ranks of targets int[B] in the whole catalogue, and the best `top_k` items.

        filter_seen: the best items exclude those of the history. sampled_ids: int[B, N], the negatives of the
        sampled protocol.
        """

    def top_k(self, queries: Queries, k: int, exclude=None, allowed=None) -> tuple[jax.Array, jax.Array]:
        """Returns (scores f32[B, k], ids int32[B, k]), best first; -inf and id 0 fill unused slots. An item
        with score -inf, which a beam search did not find, is not listed.

        exclude: (rows int[P], ids int[P]) of items to leave out, such as `queries.seen()`. allowed: bool[V +
        1], the items to choose from; None = all.
        """


class ScoreRanker:
    """A Ranker that scores every item.

    score_fn: Queries -> f32[B, V + 1], higher is better; column 0 (padding) is not read.
    """

    def __init__(self, score_fn: Callable[[Queries], np.ndarray]):
        self._score_fn = score_fn

    def scores(self, queries: Queries) -> Scores:
        """Returns the scores of every item after each history."""
        return Scores(self._score_fn(queries))

    def rank(self, queries, targets, *, top_k, filter_seen=True, sampled_ids=None) -> Ranks:
        """See `Ranker.rank`."""
        seen = _padded(queries.seen(), len(queries))
        return self.scores(queries).rank(targets, seen, sampled_ids, top_k=top_k, filter_seen=filter_seen)

    def top_k(self, queries, k, exclude=None, allowed=None):
        """See `Ranker.top_k`."""
        exclude = None if exclude is None else _padded(exclude, len(queries))
        return self.scores(queries).top_k(k, exclude, allowed)


def _padded(pairs, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rows, ids), int32, padded to a power of two so that few shapes are compiled; padding has the
    row num_rows, which does not exist."""
    rows, ids = pairs
    size = max(1024, 1 << (len(rows) - 1).bit_length())
    padding = (0, size - len(rows))
    rows = np.pad(rows.astype(np.int32), padding, constant_values=num_rows)
    return rows, np.pad(ids.astype(np.int32), padding)
