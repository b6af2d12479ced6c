"""Baselines, fitted on the training part of a split. Each is a ranker, like a trained model."""

import numpy as np
import scipy.linalg
import scipy.sparse as sp

from rec_jax.models.bpr import bpr
from rec_jax.models.ranker import ScoreRanker

_BLOCK_SCORES = 2**22  # elements of an item-by-item matrix that are computed at once
_EASE_ITEMS = 20_000  # most items for `ease`, unless its caller sets `max_items`


def popularity(histories, split) -> ScoreRanker:
    """Scores an item by its number of training events, for all users alike."""
    counts_V = split.train_item_counts(histories).astype(np.float32)
    return _same_for_all(counts_V)


def recent_popularity(histories, split, share_of_time: float = 0.1, events_per_user: int = 3) -> ScoreRanker:
    """Scores an item by its number of recent training events, for all users alike; popularity breaks ties.

    An event is recent if it is in the last `share_of_time` of the time between the first and the last
    training event; in a log without times, if it is among the last `events_per_user` training events of its
    user. Defaults were chosen on validation, 2026-11-23: with 1, 3, 5 and 20 events, NDCG@10 is 0.0265,
    0.0275, 0.0274 and 0.0221 on MovieLens-1M; with shares of 0.02, 0.05, 0.1 and 0.2, it is 0.0229, 0.0326,
    0.0358 and 0.0365 on MovieLens-100K.
    Source: Ji et al., SIGIR'20, RecentPop. Differs: all users share one window, which ends with training;
    under leave-one-out it may contain events later than a target (`experiments.prepare_data --audit` reports
    how often).
    """
    in_train = split.in_train(histories)
    if histories.times is not None:
        times = np.asarray(histories.times)
        first, last = times[in_train].min(), times[in_train].max()
        recent = in_train & (times >= last - share_of_time * (last - first))
    else:
        train_end = np.repeat(split.train_end, np.diff(histories.offsets))
        recent = in_train & (np.arange(histories.num_events) >= train_end - events_per_user)
    popular_V = split.train_item_counts(histories).astype(np.float32)
    counts_V = np.bincount(np.asarray(histories.items)[recent], minlength=len(popular_V))
    return _same_for_all((counts_V + popular_V / (popular_V.max() + 1)).astype(np.float32))


def _same_for_all(scores_V) -> ScoreRanker:
    return ScoreRanker(lambda queries: np.broadcast_to(scores_V, (len(queries), len(scores_V))))


def bigram(histories, split) -> ScoreRanker:
    """Scores an item by how often it directly followed the last item of the history in training; popularity
    breaks ties, and ranks the items that never followed it."""
    items, in_train, starts = _train_events(histories, split)
    follows = in_train[1:] & in_train[:-1] & ~starts[1:]
    pairs = (items[:-1][follows], items[1:][follows])
    num = histories.num_items + 1
    counts_VV = sp.csr_matrix((np.ones(len(pairs[0]), np.float32), pairs), shape=(num, num))
    popular_V = split.train_item_counts(histories).astype(np.float32)
    popular_V /= popular_V.max() + 1  # below 1, the count of a pair that occurs once

    def scores(queries):
        return counts_VV[queries.columns["item"][queries.ends - 1]].toarray() + popular_V

    return ScoreRanker(scores)


def item_knn(histories, split, num_neighbours: int = 100) -> ScoreRanker:
    """Scores an item by its cosine to each item of the history, summed. An item is the binary vector of its
    training users, and only the cosines of its `num_neighbours` nearest items count.

    Source: Sarwar et al., WWW'01, on binary interactions.
    """
    cosine_VV = _cosines(histories, split, num_neighbours)

    def scores(queries):
        rows, items, counts = queries.item_counts()
        shape = len(queries), len(cosine_VV.indptr) - 1
        return (sp.csr_matrix((counts.astype(np.float32), (rows, items)), shape) @ cosine_VV).toarray()

    return ScoreRanker(scores)


def ease(histories, split, regularization: float = 250.0, max_items: int | None = None) -> ScoreRanker:
    """Scores items by a linear item-to-item model with a zero diagonal, fitted in closed form; dense, V x V.

    regularization: lambda in the paper. Chosen on validation, 2026-11-23: with 100, 250 and 500, NDCG@10 is
    0.0515, 0.0524 and 0.0518 on MovieLens-1M, 0.0878, 0.0821 and 0.0792 on MovieLens-100K;
    with 250 it is 0.0496 on Beauty (2.0 GB, 73 s of CPU time on 2 cores of an AMD EPYC, Zen 4).
    Source: Steck, WWW'19 (arXiv 1905.03375), equation 8 and algorithm 1.
    Raises ValueError if there are more than `max_items` items, which would need too much memory and time.
    """
    check_ease(histories.num_items, max_items)
    size = histories.num_items + 1
    seen_UV = _train_matrix(histories, split)
    gram_VV = (seen_UV.T @ seen_UV).toarray().astype(np.float64)
    gram_VV[np.diag_indices(size)] += regularization
    weights_VV = scipy.linalg.inv(gram_VV, overwrite_a=True)
    weights_VV /= -np.diag(weights_VV)
    np.fill_diagonal(weights_VV, 0)
    weights_VV = weights_VV.astype(np.float32)

    def scores(queries):
        rows, items = queries.seen()  # as in training: repeats count once
        return (
            sp.csr_matrix((np.ones(len(rows), np.float32), (rows, items)), (len(queries), size)) @ weights_VV
        )

    return ScoreRanker(scores)


def check_ease(num_items: int, max_items: int | None = None) -> None:
    """Raises ValueError if there are more items than `ease` accepts."""
    max_items = max_items or _EASE_ITEMS
    if num_items > max_items:
        raise ValueError(
            f"max_items={max_items:,} but there are {num_items:,} items: ease would fill "
            f"{12 * (num_items + 1) ** 2 / 1e9:,.0f} GB with item-by-item matrices, and its time grows with "
            "the cube of num_items: remove it from eval.baselines, or train on fewer items (data.k_core)"
        )


def nearest_items(histories, split, num_neighbours: int) -> np.ndarray:
    """Returns int32[V + 1, K]: the nearest items of each item by the cosine of `item_knn`, nearest first; 0
    if there are fewer than K."""
    cosine_VV = _cosines(histories, split, num_neighbours)
    rows = np.repeat(np.arange(cosine_VV.shape[0]), np.diff(cosine_VV.indptr))
    order = np.lexsort((cosine_VV.indices, -cosine_VV.data, rows))
    nearest_VK = np.zeros((cosine_VV.shape[0], num_neighbours), np.int32)
    nearest_VK[rows, np.arange(len(rows)) - cosine_VV.indptr[rows]] = cosine_VV.indices[order]
    return nearest_VK


def _cosines(histories, split, num_neighbours: int):
    """Returns the cosines of `item_knn`, [V + 1, V + 1] and sparse: only those of the nearest items of
    each."""
    seen_UV = _train_matrix(histories, split)
    norms_V = np.sqrt(np.asarray(seen_UV.sum(axis=0)).ravel())
    scaled_UV = seen_UV @ sp.diags(1 / np.maximum(norms_V, 1e-9))
    return _keep_largest(scaled_UV.T.tocsr(), scaled_UV.tocsr(), num_neighbours)


def _keep_largest(left, right, num: int):
    """Returns left @ right, sparse: the `num` largest positive elements of each row, diagonal excluded."""
    rows, columns, values = [], [], []
    block = int(np.clip(_BLOCK_SCORES // right.shape[1], 1, 512))
    for first in range(0, left.shape[0], block):
        dense = (left[first : first + block] @ right).toarray()
        block_rows = np.arange(len(dense))
        dense[block_rows, block_rows + first] = 0
        keep = min(num, dense.shape[1] - 1)
        top = np.argpartition(-dense, keep, axis=1)[:, :keep]
        value = dense[block_rows[:, None], top]
        rows.append(np.repeat(block_rows + first, keep))
        columns.append(top.ravel())
        values.append(value.ravel())
    rows, columns, values = map(np.concatenate, (rows, columns, values))
    positive = values > 0
    shape = (left.shape[0], right.shape[1])
    return sp.csr_matrix((values[positive], (rows[positive], columns[positive])), shape=shape)


def _train_matrix(histories, split):
    """Returns f32[U, V + 1], sparse: 1 if the user has the item in training."""
    in_train = split.in_train(histories)
    users = np.repeat(np.arange(histories.num_users), np.diff(histories.offsets))[in_train]
    ones = np.ones(len(users), np.float32)
    shape = (histories.num_users, histories.num_items + 1)
    seen_UV = sp.csr_matrix((ones, (users, np.asarray(histories.items)[in_train])), shape=shape)
    seen_UV.data[:] = 1  # repeats count once
    return seen_UV


def _train_events(histories, split):
    """Returns (items int32[N], in_train bool[N], starts bool[N]) of all events: the item, whether the event
    is in the training part, and whether it is the first of its user."""
    items = np.asarray(histories.items)
    in_train = split.in_train(histories)
    starts = np.zeros(len(items), bool)
    lengths = np.diff(histories.offsets)
    starts[histories.offsets[:-1][lengths > 0]] = True
    return items, in_train, starts


BASELINES = {
    "popularity": popularity,
    "recent_popularity": recent_popularity,
    "bigram": bigram,
    "item_knn": item_knn,
    "ease": ease,
    "bpr": bpr,
}
