import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_jax.data.histories import (
    Histories,
    Split,
    build_histories,
    examples,
    global_temporal,
    leave_one_out,
    replaced_directory,
    temporal_cuts,
)
from rec_jax.data.interactions import InteractionLog


def make_log(rows, num_users=None, features=None):
    """rows: (user, item, time) numbers; time None for a log without times."""
    users, items, times = zip(*rows, strict=True)
    return InteractionLog(
        np.array(users, np.int32),
        np.array(items, np.int32),
        None if times[0] is None else np.array(times, np.int64),
        None,
        np.array([f"u{u}" for u in range(num_users or max(users) + 1)], object),
        np.array(["", *(f"i{i}" for i in range(1, max(items) + 1))], object),
        features or {},
    )


def user_events(histories):
    return [
        histories.items[a:b].tolist() for a, b in zip(histories.offsets, histories.offsets[1:], strict=False)
    ]


def parts(histories, split):
    """Returns the (training, validation, test) items of each user."""
    ends = zip(histories.offsets, split.train_end, split.val_end, histories.offsets[1:], strict=False)
    return [tuple(histories.items[a:b].tolist() for a, b in ((s, t), (t, v), (v, e))) for s, t, v, e in ends]


# Users 0 to 3 have 4, 1, 2 and 3 events; rows and times are out of order, some times tie.
ROWS = [
    (0, 1, 30),
    (1, 2, 5),
    (0, 2, 10),
    (3, 4, 20),
    (0, 3, 10),
    (2, 1, 7),
    (3, 1, 20),
    (2, 3, 7),
    (0, 4, 20),
]
ROWS += [(3, 5, 40)]


def test_events_are_sorted_by_time_and_ties_keep_their_order():
    histories = build_histories(make_log(ROWS))
    assert user_events(histories) == [[2, 3, 4, 1], [2], [1, 3], [4, 1, 5]]
    assert histories.times.tolist() == [10, 10, 20, 30, 5, 7, 7, 20, 20, 40]
    assert list(histories.notes.values()) == [1, 3]  # out of order: (0, 2, 10) after (0, 1, 30); ties
    assert (histories.num_users, histories.num_items, histories.num_events) == (4, 5, 10)
    assert histories.items.dtype == np.int32 and histories.offsets.dtype == np.int64


def test_without_times_events_keep_the_order_of_the_rows():
    histories = build_histories(make_log([(1, 3, None), (0, 2, None), (1, 1, None), (0, 1, None)]))
    assert user_events(histories) == [[2, 1], [3, 1]]
    assert histories.times is None and histories.notes == {}


def test_titles_and_features_follow_the_order_of_events():
    log = make_log(ROWS[:3], features={"row": np.arange(3.0), "text": np.array(["a", "b", "c"], object)})
    histories = build_histories(log, {"i1": "One", "other": "?"})
    assert histories.titles == {"i1": "One"}
    assert histories.features["row"].tolist() == [2, 0, 1]
    assert histories.features["text"].tolist() == [3, 1, 2]  # codes, in alphabetical order
    assert histories.feature_values == {"text": ("", "a", "b", "c")}
    log = dataclasses.replace(log, titles={"i2": "Two"})
    assert build_histories(log).titles == {"i2": "Two"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=40))
def test_histories_equal_the_sorted_events_of_each_user(rows):
    histories = build_histories(make_log(rows))
    for user, got in enumerate(user_events(histories)):
        mine = [row for row in rows if row[0] == user]
        assert got == [item for _, item, _ in sorted(mine, key=lambda row: row[2])]


def test_saved_histories_are_loaded_unchanged(tmp_path):
    log = make_log(ROWS, features={"f": np.arange(10.0), "text": np.array(list("abcdefghij"), object)})
    histories = build_histories(log, {"i1": "Ünï"})
    for _ in range(2):  # the second time it replaces the first
        histories.save(tmp_path / "h")
    assert [path.name for path in tmp_path.iterdir()] == ["h"]
    loaded = Histories.load(tmp_path / "h")
    assert isinstance(loaded.items, np.memmap) and isinstance(loaded.times, np.memmap)
    for name in ("items", "times", "offsets", "user_ids", "item_ids"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(histories, name))
    assert loaded.titles == {"i1": "Ünï"} and loaded.notes == histories.notes
    assert loaded.features["f"].tolist() == histories.features["f"].tolist()
    assert loaded.features["text"].tolist() == histories.features["text"].tolist()
    assert loaded.feature_values == histories.feature_values


def test_a_failed_save_leaves_the_old_one(tmp_path):
    old = build_histories(make_log(ROWS))
    old.save(tmp_path / "h")
    with pytest.raises(KeyboardInterrupt):
        with replaced_directory(tmp_path / "h", "vocabulary.json") as new:
            (new / "items.npy").write_text("half")
            raise KeyboardInterrupt
    np.testing.assert_array_equal(Histories.load(tmp_path / "h").items, old.items)
    assert [path.name for path in tmp_path.iterdir()] == ["h"]


def test_save_does_not_replace_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="contains other files"):
        build_histories(make_log(ROWS)).save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_leave_one_out_by_hand():
    histories = build_histories(make_log(ROWS))
    split = leave_one_out(histories)
    assert parts(histories, split) == [
        ([2, 3], [4], [1]),
        ([2], [], []),  # fewer than three events: training only
        ([1, 3], [], []),
        ([4], [1], [5]),
    ]
    assert split.notes == {
        "users with fewer than 3 events, training only": 2,
        "training events": 6,
        "validation targets": 2,
        "test targets": 2,
        "validation targets without an earlier event, left out": 0,
        "validation targets that no user has in training, kept": 0,
        "test targets without an earlier event, left out": 0,
        "test targets that no user has in training, kept": 1,
    }
    assert split.train_item_counts(histories).tolist() == [0, 1, 2, 2, 1, 0]
    assert split.in_train(histories).tolist() == [
        True,
        True,
        False,
        False,
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(ValueError, match="needs a user with three or more events"):
        leave_one_out(build_histories(make_log(ROWS[:3])))


def test_global_temporal_by_hand():
    histories = build_histories(make_log(ROWS))
    split = global_temporal(histories, val_time=10, test_time=20)
    assert parts(histories, split) == [
        ([], [2, 3], [4, 1]),  # an event at a cut belongs to the later part
        ([2], [], []),
        ([1, 3], [], []),
        ([], [], [4, 1, 5]),
    ]
    assert split.notes["first validation time"] == 10 and split.notes["first test time"] == 20
    assert split.notes["validation targets without an earlier event, left out"] == 1
    assert split.notes["validation targets that no user has in training, kept"] == 0
    assert split.notes["test targets without an earlier event, left out"] == 1
    assert split.notes["test targets that no user has in training, kept"] == 2  # items 4 and 5
    train_times = np.asarray(histories.times)[split.in_train(histories)]
    assert train_times.max() < 10


@pytest.mark.parametrize(
    "cuts, message",
    [
        ((20, 20), "val_time=20 must be before test_time=20"),
        ((5, 20), "leave no training events: choose them between .* 5 and 40"),
        ((11, 12), "leave no validation targets"),
        ((20, 41), "leave no test targets"),
    ],
)
def test_global_temporal_refuses_cuts_that_leave_a_part_empty(cuts, message):
    with pytest.raises(ValueError, match=message):
        global_temporal(build_histories(make_log(ROWS)), *cuts)


def test_global_temporal_needs_times():
    with pytest.raises(ValueError, match="needs times, but this log has none"):
        global_temporal(build_histories(make_log([(0, 1, None)])), 1, 2)


def test_temporal_cuts_leave_the_fractions():
    times = np.random.default_rng(0).permutation(100)
    assert temporal_cuts(times, 0.1, 0.2) == (70, 80)
    assert temporal_cuts(np.array([1, 2, 2, 2, 2, 3]), 0.25, 0.25) == (2, 2)


def test_examples_by_hand():
    histories = build_histories(make_log(ROWS))
    split = global_temporal(histories, val_time=10, test_time=20)
    val, test = (examples(histories, split, part) for part in ("val", "test"))
    # The first validation event of user 0 and the first test event of user 3 have no earlier event.
    assert (val.users.tolist(), val.ends.tolist(), val.targets.tolist()) == ([0], [1], [3])
    assert (test.users.tolist(), test.ends.tolist()) == ([0, 0, 3, 3], [2, 3, 8, 9])
    assert test.targets.tolist() == [4, 1, 1, 5]
    assert (val.num_without_history, val.num_unseen) == (1, 0)
    assert (test.num_without_history, test.num_unseen) == (1, 2)
    assert (test.users.dtype, test.ends.dtype, test.targets.dtype) == (np.int32, np.int64, np.int32)
    with pytest.raises(ValueError, match="part='dev'"):
        examples(histories, split, "dev")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(0, 9)), min_size=10, max_size=60),
    st.booleans(),
)
def test_examples_contain_only_earlier_events(rows, temporal):
    histories = build_histories(make_log(rows))
    try:
        split = global_temporal(histories, 4, 7) if temporal else leave_one_out(histories)
    except ValueError:
        return
    in_train = split.in_train(histories)
    for part in ("val", "test"):
        ex = examples(histories, split, part)
        expected = []
        for user, (train, val, test) in enumerate(parts(histories, split)):
            before = len(train) + (len(val) if part == "test" else 0)
            for i, target in enumerate(test if part == "test" else val):
                if before + i > 0:
                    expected.append((user, histories.offsets[user] + before + i, target))
        assert list(zip(ex.users.tolist(), ex.ends.tolist(), ex.targets.tolist(), strict=True)) == expected
        assert not in_train[ex.ends].any()
        for user, end in zip(ex.users, ex.ends, strict=True):
            history = histories.times[histories.offsets[user] : end]
            assert (history <= histories.times[end]).all()


def test_the_checksum_of_a_split_depends_on_events_and_ends_only(tmp_path):
    histories = build_histories(make_log(ROWS))
    split = leave_one_out(histories)
    split.save(tmp_path / "s")
    loaded = Split.load(tmp_path / "s", histories)
    assert (
        loaded.checksum == split.checksum and loaded.notes == split.notes and loaded.kind == "leave_one_out"
    )
    np.testing.assert_array_equal(loaded.train_end, split.train_end)
    assert leave_one_out(build_histories(make_log(ROWS))).checksum == split.checksum
    swapped = [ROWS[2], ROWS[1], ROWS[0], *ROWS[3:]]  # another row order, the same order in time
    assert leave_one_out(build_histories(make_log(swapped))).checksum == split.checksum
    other_ties = [*ROWS[:2], ROWS[4], ROWS[3], ROWS[2], *ROWS[5:]]  # another order of tied events
    assert leave_one_out(build_histories(make_log(other_ties))).checksum != split.checksum
    assert global_temporal(histories, 10, 20).checksum != split.checksum

    changed = dataclasses.replace(histories, items=histories.items[::-1].copy())
    with pytest.raises(ValueError, match="do not match the checksum in split.json"):
        Split.load(tmp_path / "s", changed)
    about = json.loads((tmp_path / "s" / "split.json").read_text())
    assert about["checksum"] == split.checksum
