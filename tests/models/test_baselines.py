import numpy as np
import pytest

from rec_jax.data.histories import Histories, leave_one_out
from rec_jax.models.baselines import bigram, item_knn, popularity


@pytest.fixture
def data():
    """Four users; the last two events of each are held out: 5 and 6 occur there alone."""
    rows = [[1, 2, 3, 5, 6], [1, 2, 4, 5, 6], [2, 1, 2, 5, 6], [3, 4, 6, 5]]
    histories = Histories(
        items=np.concatenate(rows).astype(np.int32),
        times=None,
        offsets=np.cumsum([0, *map(len, rows)]),
        user_ids=np.array(list("abcd")),
        item_ids=np.array(["", *"uvwxyz"]),
    )
    return histories, leave_one_out(histories)


def test_popularity_counts_training_events_alone(data):
    histories, split = data
    scores = popularity(histories, split)(np.array([0, 3]), np.array([3, 16]))
    np.testing.assert_array_equal(scores, [[0, 3, 4, 2, 2, 0, 0]] * 2)


def test_bigram_counts_followers_within_users(data):
    histories, split = data
    # Histories that end in item 2 (user 0 after two events) and in item 4 (user 3 after two).
    scores = bigram(histories, split)(np.array([0, 3]), np.array([2, 17]))
    after_2 = {1: 1, 3: 1, 4: 1}
    np.testing.assert_array_equal(np.floor(scores[0]), [after_2.get(v, 0) for v in range(7)])
    # 4 is never followed in training: popularity decides, and stays below any seen pair.
    np.testing.assert_allclose(scores[1], np.array([0, 3, 4, 2, 2, 0, 0]) / 5)


def test_item_knn_is_the_summed_cosine(data):
    histories, split = data
    train = [{1, 2, 3}, {1, 2, 4}, {1, 2}, {3, 4}]
    owners = {v: {u for u, items in enumerate(train) if v in items} for v in range(1, 7)}

    def cosine(a, b):
        if a == b or not owners[a] or not owners[b]:
            return 0.0
        return len(owners[a] & owners[b]) / np.sqrt(len(owners[a]) * len(owners[b]))

    scores = item_knn(histories, split)(np.array([0, 2]), np.array([3, 13]))
    for row, history in zip(scores, [[1, 2, 3], [2, 1, 2]], strict=True):
        expected = [0.0] + [sum(cosine(a, v) for a in history) for v in range(1, 7)]
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_item_knn_keeps_the_nearest_alone(data):
    histories, split = data
    scores = item_knn(histories, split, num_neighbours=1)(np.array([0]), np.array([1]))
    assert np.count_nonzero(scores[0]) == 1 and np.argmax(scores[0]) == 2  # 1 and 2 share all users
