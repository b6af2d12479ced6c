"""Baselines that keep everyone honest: fitted on the training part of a split, scored like a model."""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp


def popularity(histories, split) -> Callable:
    """Training events of each item, the same for every user."""
    counts_V = split.train_item_counts(histories).astype(np.float32)

    def score_fn(users, ends):
        return np.broadcast_to(counts_V, (len(users), len(counts_V)))

    return score_fn


def bigram(histories, split) -> Callable:
    """How often an item directly followed the last one in training; popularity breaks ties and backs off."""
    items, in_train, starts = _train_events(histories, split)
    follows = in_train[1:] & in_train[:-1] & ~starts[1:]
    pairs = (items[:-1][follows], items[1:][follows])
    num = histories.num_items + 1
    counts_VV = sp.csr_matrix((np.ones(len(pairs[0]), np.float32), pairs), shape=(num, num))
    popular_V = split.train_item_counts(histories).astype(np.float32)
    popular_V /= popular_V.max() + 1  # below one: less than any seen pair

    def score_fn(users, ends):
        last = histories.items[np.asarray(ends) - 1]
        return counts_VV[last].toarray() + popular_V

    return score_fn


def item_knn(histories, split, num_neighbours: int = 100) -> Callable:
    """Sum over the history of the cosine between items as sets of training users, nearest neighbours only.

    Source: Sarwar et al., WWW'01, on binary interactions.
    """
    num = histories.num_items + 1
    cosine_VV = _cosines(histories, split, num_neighbours)

    def score_fn(users, ends):
        starts = histories.offsets[users]
        lengths = np.asarray(ends) - starts
        rows = np.repeat(np.arange(len(users)), lengths)
        last = np.cumsum(lengths)
        source = np.repeat(starts - (last - lengths), lengths) + np.arange(last[-1])
        ones = np.ones(len(rows), np.float32)
        history_BV = sp.csr_matrix((ones, (rows, histories.items[source])), shape=(len(users), num))
        return (history_BV @ cosine_VV).toarray()

    return score_fn


def nearest_items(histories, split, num_neighbours: int) -> np.ndarray:
    """int32[V + 1, K]: the items nearest to each by that cosine, nearest first; 0 where there are fewer."""
    cosine_VV = _cosines(histories, split, num_neighbours)
    rows = np.repeat(np.arange(cosine_VV.shape[0]), np.diff(cosine_VV.indptr))
    order = np.lexsort((cosine_VV.indices, -cosine_VV.data, rows))
    nearest_VK = np.zeros((cosine_VV.shape[0], num_neighbours), np.int32)
    nearest_VK[rows, np.arange(len(rows)) - cosine_VV.indptr[rows]] = cosine_VV.indices[order]
    return nearest_VK


def _cosines(histories, split, num_neighbours: int):
    """[V + 1, V + 1], sparse: between items as sets of training users, of the nearest of each."""
    items, in_train, starts = _train_events(histories, split)
    users = np.cumsum(starts)[in_train] - 1
    num = histories.num_items + 1
    seen_UV = sp.csr_matrix(
        (np.ones(len(users), np.float32), (users, items[in_train])), shape=(histories.num_users, num)
    )
    seen_UV.data[:] = 1  # repeats count once
    norms_V = np.sqrt(np.asarray(seen_UV.sum(axis=0)).ravel())
    scaled_UV = seen_UV @ sp.diags(1 / np.maximum(norms_V, 1e-9))
    return _keep_largest(scaled_UV.T.tocsr(), scaled_UV.tocsr(), num_neighbours)


def _keep_largest(left, right, num: int, block: int = 512):
    """The rows of left @ right without the diagonal, cut to their `num` largest entries."""
    rows, columns, values = [], [], []
    for first in range(0, left.shape[0], block):
        dense = (left[first : first + block] @ right).toarray()
        here = np.arange(len(dense))
        dense[here, here + first] = 0
        keep = min(num, dense.shape[1] - 1)
        top = np.argpartition(-dense, keep, axis=1)[:, :keep]
        value = dense[here[:, None], top]
        rows.append(np.repeat(here + first, keep))
        columns.append(top.ravel())
        values.append(value.ravel())
    rows, columns, values = map(np.concatenate, (rows, columns, values))
    real = values > 0
    shape = (left.shape[0], right.shape[1])
    return sp.csr_matrix((values[real], (rows[real], columns[real])), shape=shape)


def _train_events(histories, split):
    """items int32[N], bool[N] in the training part, bool[N] first of its user."""
    items = np.asarray(histories.items)
    in_train = split.in_train(histories)
    starts = np.zeros(len(items), bool)
    lengths = np.diff(histories.offsets)
    starts[histories.offsets[:-1][lengths > 0]] = True
    return items, in_train, starts


BASELINES = {"popularity": popularity, "bigram": bigram, "item_knn": item_knn}
