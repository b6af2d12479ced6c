"""The vocabulary against one that handles a key at a time, and by hand."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_jax.tables.vocabulary import DynamicVocabulary


def restored(vocabulary):
    """What a save and a restore make of it."""
    return DynamicVocabulary.from_state_dict(json.loads(json.dumps(vocabulary.state_dict())))


def test_by_hand():
    vocabulary = DynamicVocabulary(3, admit_after=2, evict_after=10)
    assert vocabulary.rows_of(["a", "b", "a", None], 0).tolist() == [1, 0, 1, 0]
    assert vocabulary.lookup(["b", "b", "b"]).tolist() == [0, 0, 0]  # does not count
    assert vocabulary.rows_of(["b"], 5).tolist() == [2]
    assert vocabulary.take_new_rows().tolist() == [1, 2]
    assert vocabulary.take_new_rows().tolist() == []
    # The table is full. At 10 row 1 is 10 old, not older.
    assert vocabulary.rows_of(["c", "c"], 10).tolist() == [0, 0]
    assert (vocabulary.refused, vocabulary.evicted, len(vocabulary)) == (1, 0, 2)
    assert vocabulary.rows_of(["c"], 11).tolist() == [1]
    assert (vocabulary.refused, vocabulary.evicted, len(vocabulary)) == (1, 1, 2)
    assert vocabulary.lookup(["a", "b", "c"]).tolist() == [0, 2, 1]
    assert vocabulary.take_new_rows().tolist() == [1]
    # "a" starts again from zero, and "b" was used at this time: only then would there be a row.
    assert vocabulary.rows_of(["a", "b"], 16).tolist() == [0, 2]
    assert vocabulary.rows_of(["a", "b"], 22).tolist() == [1, 2]


class OneAtATime:
    """The rules as they are told, without arrays."""

    def __init__(self, num_rows, admit_after, evict_after):
        self.num_rows, self.admit_after, self.evict_after = num_rows, admit_after, evict_after
        self.row, self.used, self.counts, self.refused = {}, {}, Counter(), 0

    def rows_of(self, keys, time):
        for key in keys:
            if key in self.row:
                self.used[key] = time
            elif key is not None:
                self.counts[key] += 1
        due = [key for key in dict.fromkeys(keys) if self.counts[key] >= self.admit_after]
        for key in sorted(due, key=lambda key: -self.counts[key]):
            row = self.find_row(time)
            self.refused += row is None
            if row is not None:
                self.row[key], self.used[key] = row, time
                del self.counts[key]
        return [self.row.get(key, 0) for key in keys]

    def find_row(self, time):
        free = set(range(1, self.num_rows)) - set(self.row.values())
        if free:
            return min(free)
        oldest = min(self.row, key=lambda key: (self.used[key], self.row[key]))
        if time - self.used[oldest] > self.evict_after:
            return self.row.pop(oldest)
        return None


KEYS = {
    "ints": st.integers(-3, 12) | st.none(),
    "strings": st.sampled_from([*"abcdefgh", "", "7", "a\0", "ü"]) | st.none(),
}


@pytest.mark.parametrize("kind", KEYS)
@settings(max_examples=100)
@given(data=st.data())
def test_as_one_that_takes_a_key_at_a_time(kind, data):
    settings = {
        "num_rows": data.draw(st.integers(2, 7)),
        "admit_after": data.draw(st.integers(1, 3)),
        "evict_after": data.draw(st.integers(0, 3)),
    }
    vocabulary, slow, time, new_rows = DynamicVocabulary(**settings), OneAtATime(**settings), 0, {}
    for keys, later in data.draw(
        st.lists(st.tuples(st.lists(KEYS[kind], max_size=12), st.integers(0, 3)), max_size=12)
    ):
        time += later
        before = dict(slow.row)
        expected = slow.rows_of(keys, time)
        got = vocabulary.rows_of(keys, time)
        assert got.dtype == np.int32 and got.tolist() == expected
        assert vocabulary.refused == slow.refused and len(vocabulary) == len(slow.row)
        assert vocabulary.lookup(keys).tolist() == expected
        new_rows = {row for key, row in slow.row.items() if before.get(key) != row}
        assert vocabulary.take_new_rows().tolist() == sorted(new_rows)
        # Distinct keys never share a row.
        rows = vocabulary.lookup([*slow.row])
        assert rows.tolist() == [*slow.row.values()] and len(set(rows.tolist())) == len(slow.row)
        vocabulary = restored(vocabulary)


def test_a_saved_and_restored_vocabulary_goes_on_as_if_nothing_had_happened():
    rng = np.random.default_rng(0)
    one = DynamicVocabulary(6, admit_after=2, evict_after=2, max_pending=20)
    other = DynamicVocabulary(6, admit_after=2, evict_after=2, max_pending=20)
    for time in range(20):
        keys = np.array([f"item {x}" for x in rng.zipf(1.2, 60) % 300 + time])
        np.testing.assert_array_equal(one.rows_of(keys, np.int64(time)), other.rows_of(keys, time))
        if time % 3 == 0:
            np.testing.assert_array_equal(one.take_new_rows(), other.take_new_rows())
        state = other.state_dict()
        other = restored(other)
        assert other.state_dict() == state == one.state_dict()
    assert one.evicted and one.refused and state["pending"] and len(state["new_rows"])


def test_a_row_used_now_is_never_evicted():
    vocabulary = DynamicVocabulary(4, evict_after=0)
    assert vocabulary.rows_of([10, 11, 12], 0).tolist() == [1, 2, 3]
    assert vocabulary.rows_of([20, 10, 21, 12, 22], 0).tolist() == [0, 1, 0, 3, 0]
    assert vocabulary.refused == 3
    # Row 2 is the only one that is not in use at time 1.
    assert vocabulary.rows_of([20, 10, 21, 12, 22], 1).tolist() == [2, 1, 0, 3, 0]
    assert vocabulary.lookup([11]).tolist() == [0]


def test_the_longest_unused_row_goes_first():
    vocabulary = DynamicVocabulary(4, evict_after=1)
    for time, key in enumerate([1, 2, 3, 1]):
        vocabulary.rows_of([key], time)
    assert vocabulary.rows_of([4], 6).tolist() == [2]
    assert vocabulary.rows_of([5], 6).tolist() == [3]
    assert vocabulary.rows_of([6], 6).tolist() == [1]
    assert vocabulary.rows_of([7], 6).tolist() == [0]


def test_where_rows_run_out_the_most_frequent_keys_get_them():
    vocabulary = DynamicVocabulary(3, evict_after=9)
    assert vocabulary.rows_of([5, 6, 7, 8, 7, 8, 7], 0).tolist() == [0, 0, 1, 2, 1, 2, 1]


def test_odd_streams():
    vocabulary = DynamicVocabulary(5, admit_after=3, evict_after=1)
    for empty in ([], np.zeros(0, int), np.zeros(0, str)):
        assert vocabulary.rows_of(empty, 0).tolist() == [] == vocabulary.lookup(empty).tolist()
    assert vocabulary.rows_of([None, None], 0).tolist() == [0, 0]
    assert vocabulary.rows_of(np.full(1000, -(2**63)), 0).tolist() == [1] * 1000
    assert vocabulary.rows_of(["7"] * 3, 0).tolist() == [2] * 3
    assert vocabulary.rows_of(np.full(3, 7, np.uint64), 0).tolist() == [3] * 3  # 7 and "7" differ
    assert vocabulary.lookup(np.array(["7", None], object)).tolist() == [2, 0]
    assert restored(vocabulary).lookup([7, 8]).tolist() == [3, 0]
    assert restored(vocabulary).lookup(["7", "8"]).tolist() == [2, 0]
    many = vocabulary.rows_of(np.repeat(np.arange(1000), 3), 9)
    assert sorted(set(many.tolist())) == [0, 1, 2, 3, 4] and len(vocabulary) == 4
    assert vocabulary.refused == 1000 - 4


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 15), max_size=12), max_size=15), st.integers(1, 6))
def test_counts_of_keys_without_a_row_are_bounded_and_hardly_wrong(batches, max_pending):
    vocabulary = DynamicVocabulary(2, admit_after=10**6, evict_after=0, max_pending=max_pending)
    true = Counter()
    for keys in batches:
        vocabulary.rows_of(keys, 0)
        true.update(keys)
        counts = dict(vocabulary.state_dict()["pending"])
        assert len(counts) <= max_pending
        for key, count in true.items():
            assert count - true.total() / (max_pending + 1) <= counts.get(key, 0) <= count
            assert counts.get(key) != 0


def test_forgetting_by_hand():
    vocabulary = DynamicVocabulary(2, admit_after=99, evict_after=0, max_pending=1)
    vocabulary.rows_of([1] * 10 + [2] * 9, 0)
    assert vocabulary.state_dict()["pending"] == [[1, 1]]
    vocabulary.rows_of([2] * 9, 0)
    assert vocabulary.state_dict()["pending"] == [[2, 8]]


def test_a_frequent_key_is_admitted_however_many_rare_ones_pass():
    vocabulary = DynamicVocabulary(1000, admit_after=20, evict_after=10**9, max_pending=50)
    for step in range(200):
        vocabulary.rows_of([-1] * 5 + [*range(step * 100, step * 100 + 100)], step)
    assert vocabulary.lookup([-1]).tolist() == [1] and len(vocabulary) == 1


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"num_rows": 1}, "num_rows=1 must be at least 2"),
        ({"admit_after": 0}, "admit_after=0"),
        ({"evict_after": -1}, "evict_after=-1"),
        ({"max_pending": 0}, "max_pending=0"),
    ],
)
def test_wrong_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        DynamicVocabulary(**({"num_rows": 9, "evict_after": 1} | settings))


@pytest.mark.parametrize(
    "keys", [[1, "a"], [1.5], [True], [2**64], [b"a"], np.zeros((2, 2), int), [[1]], [float("nan")]], ids=str
)
def test_keys_that_are_none(keys):
    vocabulary = DynamicVocabulary(9, evict_after=1)
    for read in (vocabulary.lookup, lambda keys: vocabulary.rows_of(keys, 0)):
        with pytest.raises(ValueError, match="keys"):
            read(keys)


def test_time_goes_forward_in_whole_steps():
    vocabulary = DynamicVocabulary(9, evict_after=1)
    vocabulary.rows_of([1], 5)
    vocabulary.rows_of([1], 5)
    with pytest.raises(ValueError, match="time=4 is before the last call's, 5"):
        restored(vocabulary).rows_of([1], 4)
    with pytest.raises(ValueError, match="time=5.5"):
        vocabulary.rows_of([1], 5.5)
