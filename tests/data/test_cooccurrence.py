"""Vectors from neighbours in training histories: planted groups, and nothing from the held-out events."""

import numpy as np
from test_histories import make_log

from rec_jax.data.cooccurrence import cooccurrence_vectors
from rec_jax.data.histories import build_histories, leave_one_out

GROUPS = [range(1, 9), range(9, 17)]


def make(held_out=(1, 2)):
    """Each user takes items of one group; the last two events of all users are `held_out`."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(60):
        group = np.array(GROUPS[user % 2])
        for time, item in enumerate([*rng.choice(group, 10), *held_out]):
            rows.append((user, int(item), time))
    histories = build_histories(make_log(rows))
    return cooccurrence_vectors(histories, leave_one_out(histories))


def test_items_of_a_group_are_near():
    vectors_VF = make()
    assert vectors_VF.shape[0] == 17 and not vectors_VF[0].any()
    unit_VF = vectors_VF[1:] / np.linalg.norm(vectors_VF[1:], axis=1, keepdims=True)
    cosines = unit_VF @ unit_VF.T
    same, other = cosines[:8, :8].mean(), np.abs(cosines[:8, 8:]).mean()
    assert same > 0.1 and other < 0.05


def test_held_out_events_are_not_read():
    np.testing.assert_array_equal(make((1, 2)), make((9, 16)))


def test_histories_without_neighbours_give_zero_vectors():
    rows = [(user, user % 5 + 1, time) for user in range(10) for time in range(4)]
    histories = build_histories(make_log(rows))
    assert not cooccurrence_vectors(histories, leave_one_out(histories)).any()
