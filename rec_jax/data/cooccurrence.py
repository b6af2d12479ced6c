"""Item vectors made from the training histories alone, for items that have no other description."""

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from rec_jax.data.histories import Histories, Split

_WINDOW = 5  # events between two items that still count as neighbours
_DIMS = 64


def cooccurrence_vectors(histories: Histories, split: Split) -> np.ndarray:
    """Returns f32[V + 1, F]: items that occur near the same items in training histories have near vectors.

    A truncated singular value decomposition of the positive pointwise mutual information of items at most
    _WINDOW events apart; an item without neighbours, like row 0, is the zero vector.
    Source: Levy & Goldberg, NeurIPS'14, section 5, with items for words and singular values at power 1/2.
    """
    size = histories.num_items + 1
    in_train = split.in_train(histories)
    items = np.asarray(histories.items)[in_train]
    users = np.repeat(np.arange(histories.num_users), np.diff(histories.offsets))[in_train]
    counts_VV = sp.csr_matrix((size, size), dtype=np.float64)
    for distance in range(1, _WINDOW + 1):
        is_near = (users[distance:] == users[:-distance]) & (items[distance:] != items[:-distance])
        first, second = items[:-distance][is_near], items[distance:][is_near]
        counts_VV += sp.csr_matrix((np.ones(len(first)), (first, second)), (size, size))
    counts_VV = (counts_VV + counts_VV.T).tocoo()
    counts_V = np.asarray(counts_VV.sum(axis=1)).reshape(-1)
    expected = counts_V[counts_VV.row] * counts_V[counts_VV.col] / max(counts_V.sum(), 1)
    information_VV = sp.csr_matrix(
        (np.maximum(np.log(counts_VV.data / expected), 0), (counts_VV.row, counts_VV.col)), (size, size)
    )
    dims = min(_DIMS, size - 2)
    if dims < 1 or information_VV.count_nonzero() == 0:
        return np.zeros((size, 1), np.float32)
    left_VF, singular_F, _ = svds(information_VV, k=dims, v0=np.ones(size))
    vectors_VF = left_VF * np.sqrt(np.maximum(singular_F, 0))
    vectors_VF[counts_V == 0] = 0  # rounding leaves about 1e-16
    return vectors_VF.astype(np.float32)
