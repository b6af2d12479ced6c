"""Baselines against small examples by hand, loops, and planted tastes."""

import dataclasses

import numpy as np
import pytest

from rec_jax.data.histories import Histories, leave_one_out
from rec_jax.data.queries import Queries
from rec_jax.models import baselines
from rec_jax.models.baselines import BASELINES, bigram, bpr, ease, item_knn, popularity, recent_popularity
from rec_jax.models.bpr import make_negatives


def scores_of(ranker, histories, users, ends):
    return np.asarray(ranker.scores(Queries.of(histories, users, ends)).values_BV)


def make_data(rows, num_items, times=None):
    histories = Histories(
        items=np.concatenate(rows).astype(np.int32),
        times=times,
        offsets=np.cumsum([0, *map(len, rows)]),
        user_ids=np.array([f"u{user}" for user in range(len(rows))]),
        item_ids=np.array(["", *(f"i{item}" for item in range(1, num_items + 1))]),
    )
    return histories, leave_one_out(histories)


@pytest.fixture
def data():
    """Four users. The last two events of each are held out; items 5 and 6 occur only in these."""
    return make_data([[1, 2, 3, 5, 6], [1, 2, 4, 5, 6], [2, 1, 2, 5, 6], [3, 4, 6, 5]], 6)


def test_popularity_counts_only_training_events(data):
    histories, split = data
    scores = scores_of(popularity(histories, split), histories, np.array([0, 3]), np.array([3, 16]))
    np.testing.assert_array_equal(scores, [[0, 3, 4, 2, 2, 0, 0]] * 2)


def test_bigram_counts_followers_within_users(data):
    histories, split = data
    # Histories that end in item 2 (user 0 after two events) and in item 4 (user 3 after two).
    scores = scores_of(bigram(histories, split), histories, np.array([0, 3]), np.array([2, 17]))
    after_2 = {1: 1, 3: 1, 4: 1}
    np.testing.assert_array_equal(np.floor(scores[0]), [after_2.get(v, 0) for v in range(7)])
    # Item 4 is never followed in training, so popularity decides, with scores below those of pairs.
    np.testing.assert_allclose(scores[1], np.array([0, 3, 4, 2, 2, 0, 0]) / 5)


def test_item_knn_is_the_summed_cosine(data):
    histories, split = data
    train = [{1, 2, 3}, {1, 2, 4}, {1, 2}, {3, 4}]
    users = {v: {u for u, items in enumerate(train) if v in items} for v in range(1, 7)}

    def cosine(a, b):
        if a == b or not users[a] or not users[b]:
            return 0.0
        return len(users[a] & users[b]) / np.sqrt(len(users[a]) * len(users[b]))

    scores = scores_of(item_knn(histories, split), histories, np.array([0, 2]), np.array([3, 13]))
    for row, history in zip(scores, [[1, 2, 3], [2, 1, 2]], strict=True):
        expected = [0.0] + [sum(cosine(a, v) for a in history) for v in range(1, 7)]
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_item_knn_uses_only_the_nearest_items(data):
    histories, split = data
    scores = scores_of(item_knn(histories, split, num_neighbours=1), histories, np.array([0]), np.array([1]))
    assert np.count_nonzero(scores[0]) == 1 and np.argmax(scores[0]) == 2  # 1 and 2 have the same users


def test_recent_popularity_without_times_counts_the_last_events_of_each_user(data):
    histories, split = data
    scores = scores_of(
        recent_popularity(histories, split, events_per_user=1), histories, np.array([0, 3]), np.array([3, 16])
    )
    # The last training events are 3, 4, 2 and 4; all training events of 1 to 4 are 3, 4, 2 and 2.
    np.testing.assert_allclose(scores, [[0, 3 / 5, 1 + 4 / 5, 1 + 2 / 5, 2 + 2 / 5, 0, 0]] * 2)


def test_recent_popularity_with_times_counts_the_last_part_of_the_training_period(data):
    histories, split = data
    # Training ends at time 100, so its last tenth starts at 90. Held-out events come later.
    times = [0, 10, 20, 200, 300, 50, 89, 90, 200, 300, 95, 95, 100, 200, 300, 10, 20, 200, 300]
    histories = dataclasses.replace(histories, times=np.array(times))
    scores = scores_of(
        recent_popularity(histories, split, share_of_time=0.1), histories, np.array([1]), np.array([8])
    )
    np.testing.assert_allclose(scores, [[0, 1 + 3 / 5, 2 + 4 / 5, 2 / 5, 1 + 2 / 5, 0, 0]])


def test_ease_is_a_ridge_regression_of_each_item_on_the_others(data):
    histories, split = data
    ranker = ease(histories, split, regularization=0.7)
    seen_UV = np.zeros((4, 7))
    for user, items in enumerate([{1, 2, 3}, {1, 2, 4}, {1, 2}, {3, 4}]):
        seen_UV[user, list(items)] = 1
    weights_VV = np.zeros((7, 7))
    for item in range(7):
        others = np.arange(7) != item
        x, y = seen_UV[:, others], seen_UV[:, item]
        weights_VV[others, item] = np.linalg.solve(x.T @ x + 0.7 * np.eye(6), x.T @ y)
    # User 2 has item 2 twice; it counts once. The scores after a single item are its weights, 0 on the
    # diagonal.
    repeated = scores_of(ranker, histories, [2], [13])
    np.testing.assert_allclose(repeated[0], seen_UV[2] @ weights_VV, atol=1e-6)
    single = scores_of(ranker, histories, [0, 3], [1, 16])
    np.testing.assert_allclose(single, weights_VV[[1, 3]], atol=1e-6)
    assert single[0, 1] == single[1, 3] == 0


def test_ease_refuses_large_catalogues(data):
    with pytest.raises(ValueError, match="max_items=5 but there are 6 items: ease would fill .* GB"):
        ease(*data, max_items=5)


@pytest.fixture(scope="module")
def two_tastes():
    """Half of the users have items from 1 to 10, the others from 11 to 20; eight each, in random order."""
    rng = np.random.default_rng(0)
    return make_data([rng.permutation(10)[:8] + 1 + 10 * (user % 2) for user in range(60)], 20)


def test_bpr_learns_the_taste_of_each_user(two_tastes):
    histories, split = two_tastes
    users, ends = np.arange(60), split.train_end
    ranker = bpr(histories, split, width=8, epochs=60, learning_rate=0.05)
    scores_UV = scores_of(ranker, histories, users, ends)
    popular_UV = scores_of(popularity(histories, split), histories, users, ends)
    own_taste = (np.arange(21) - 1) // 10 == users[:, None] % 2
    other_taste = ~own_taste & (np.arange(21) > 0)

    def share_below(scores_UV):
        """The share of the other taste's items that score below the held-out item."""
        target_U1 = scores_UV[users, histories.items[ends]][:, None]
        return np.mean((scores_UV < target_U1)[other_taste])

    assert share_below(scores_UV) > 0.98 > 0.6 > share_below(popular_UV)


def test_bpr_depends_only_on_its_seed(two_tastes):
    queries = two_tastes[0], np.arange(60), two_tastes[1].train_end
    rankers = (bpr(*two_tastes, width=8, epochs=2, seed=seed) for seed in (3, 3, 4))
    first, again, other = (scores_of(ranker, *queries) for ranker in rankers)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


def test_bpr_scores_are_biases_for_users_without_training_events(two_tastes):
    histories, split = two_tastes
    train_end = split.train_end.copy()
    train_end[[4, 7]] = histories.offsets[[4, 7]]
    ranker = bpr(histories, dataclasses.replace(split, train_end=train_end), width=8, epochs=2)
    known, *unknown = scores_of(ranker, histories, np.array([0, 4, 7]), np.array([1, 33, 57]))
    np.testing.assert_array_equal(*unknown)
    np.testing.assert_array_equal(
        ranker.scores(Queries.one([3])).values_BV[0], unknown[0]
    )  # user not in the log
    assert np.any(known != unknown[0])


def test_negatives_are_drawn_uniformly_from_items_that_the_user_does_not_have():
    items_of = {0: [2, 4, 2], 1: [1], 2: [5], 3: [1, 2, 3, 4, 5], 5: [1, 2, 4, 5]}  # user 4 has no event
    users = np.repeat(list(items_of), [len(items) for items in items_of.values()])
    positives = np.concatenate(list(items_of.values()))
    draw, rng = make_negatives(users, positives, 5), np.random.default_rng(0)
    drawn = np.array([draw(rng) for _ in range(600)])
    for event, (user, positive) in enumerate(zip(users, positives, strict=True)):
        free = sorted(set(range(1, 6)) - set(items_of[user])) or [positive]
        negatives, counts = np.unique(drawn[:, event], return_counts=True)
        assert negatives.tolist() == free
        assert abs(counts - 600 / len(free)).max() < 60  # five standard deviations


@pytest.mark.parametrize("name", BASELINES)
def test_held_out_events_are_not_read(two_tastes, name):
    histories, split = two_tastes
    times = np.tile(np.arange(8), 60)
    in_train = split.in_train(histories)
    other = dataclasses.replace(
        histories, items=np.where(in_train, histories.items, 21 - histories.items), times=None
    )
    with_times = dataclasses.replace(histories, times=times)
    other_times = dataclasses.replace(other, times=times + ~in_train)
    for pair in ((histories, other), (with_times, other_times)):
        scores = (scores_of(BASELINES[name](x, split), x, np.arange(60), split.train_end) for x in pair)
        np.testing.assert_array_equal(*scores)


def test_item_knn_is_the_same_in_blocks_of_items(two_tastes, monkeypatch):
    queries = two_tastes[0], np.arange(60), two_tastes[1].train_end
    in_one_block = scores_of(item_knn(*two_tastes), *queries)
    monkeypatch.setattr(baselines, "_BLOCK_SCORES", 40)
    np.testing.assert_array_equal(scores_of(item_knn(*two_tastes), *queries), in_one_block)
