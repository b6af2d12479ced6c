import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_jax.data.histories import Histories, leave_one_out
from rec_jax.data.packing import plan_packing
from rec_jax.data.pipeline import BatchSource, EpochPlan, make_iterator


def make_data(lengths, seed=0):
    """Histories of the given lengths; all items are different, so that they identify the events."""
    total = int(np.sum(lengths))
    items = np.random.default_rng(seed).permutation(total).astype(np.int32) + 1
    histories = Histories(
        items=items,
        times=None,
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        user_ids=np.array([str(i) for i in range(len(lengths))]),
        item_ids=np.array(["", *(str(i) for i in range(1, total + 1))]),
    )
    return histories, leave_one_out(histories)


def source(data, **kwargs):
    defaults = {"max_len": 8, "batch_rows": 4, "epochs": 3, "seed": 0}
    fields = defaults | kwargs
    plan = EpochPlan(**{name: x for name, x in fields.items() if name in EpochPlan.__dataclass_fields__})
    others = {name: x for name, x in fields.items() if name not in EpochPlan.__dataclass_fields__}
    return BatchSource(*data, plan, **others)


def segments_of(batch):
    """Yields (items, targets, positions) of every segment of a batch."""
    for row in range(len(batch.items)):
        for segment in range(1, batch.segments[row].max() + 1):
            inside = batch.segments[row] == segment
            yield tuple(x[row][inside] for x in (batch.items, batch.targets, batch.positions))


lengths_lists = st.lists(st.integers(0, 30), min_size=1, max_size=40)


@given(lengths_lists, st.integers(1, 12))
def test_every_user_has_one_slot_and_no_row_overflows(lengths, row_len):
    if max(lengths) == 0:
        with pytest.raises(ValueError, match="nothing to learn"):
            plan_packing(np.array(lengths), row_len)
        return
    plan = plan_packing(np.array(lengths), row_len)
    users = np.flatnonzero(lengths)
    assert sorted(plan.users_by_len) == list(users)
    assert sorted(plan.slot_len) == sorted(np.minimum(np.array(lengths)[users], row_len))
    assert np.all(np.add.reduceat(plan.slot_len, plan.row_starts[:-1]) <= row_len)
    assert np.all(np.diff(plan.row_starts) > 0)


def test_rows_are_nearly_full_on_long_tailed_lengths():
    lengths = np.random.default_rng(0).geometric(1 / 7, 20_000)
    assert plan_packing(lengths, 50).fill > 0.98


@settings(max_examples=25)
@given(lengths_lists.filter(lambda x: max(x) > 3), st.integers(1, 5), st.booleans())
def test_an_epoch_contains_every_training_target_once_and_nothing_else(lengths, rows, all_windows):
    histories, split = make_data(lengths)
    batches = source((histories, split), batch_rows=rows, all_windows=all_windows)
    for epoch in range(2):
        seen = []
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            for items, targets, positions in segments_of(batches[step]):
                np.testing.assert_array_equal(positions, np.arange(len(items)))
                np.testing.assert_array_equal(items[1:], targets[:-1])
                seen += list(targets)
        expected = []
        for user in range(len(lengths)):
            train = histories.items[histories.offsets[user] : split.train_end[user]]
            expected += list(train[1:] if all_windows else train[1:][-8:])
        assert sorted(seen) == sorted(expected)


def test_no_batch_contains_a_held_out_event():
    histories, split = make_data([12, 3, 40, 5, 7, 3, 9] * 5)
    held_out = {
        int(item)
        for user in range(histories.num_users)
        for item in histories.items[split.train_end[user] : histories.offsets[user + 1]]
    }
    for all_windows in (False, True):
        batches = source((histories, split), all_windows=all_windows)
        for step in range(len(batches)):
            batch = batches[step]
            assert not held_out & set(np.concatenate([batch.items, batch.targets]).ravel().tolist())


def test_epochs_differ_and_a_batch_depends_only_on_seed_and_step():
    data = make_data(np.random.default_rng(1).integers(3, 12, 60))
    first, again, other = source(data), source(data), source(data, seed=1)
    again[0], again[7]  # another order of access
    np.testing.assert_array_equal(first[5].items, again[5].items)
    assert np.any(first[5].items != other[5].items)
    assert np.any(first[0].items != first[first.steps_per_epoch].items)


def test_hosts_share_a_batch():
    data = make_data(np.random.default_rng(1).integers(3, 12, 60))
    whole = source(data)
    hosts = [source(data, host=host, num_hosts=2) for host in range(2)]
    for step in range(len(whole)):
        parts = [host[step].items for host in hosts]
        together = np.concatenate(parts)
        assert together.shape == whole[step].items.shape
        np.testing.assert_array_equal(together, whole[step].items)
    with pytest.raises(ValueError, match="batch_rows=4"):
        source(data, num_hosts=3)


def test_users_returns_the_users_with_events_in_a_batch():
    histories, split = make_data([5, 9, 4, 30, 6, 7])
    batches = source((histories, split), batch_rows=2, all_windows=True)
    owner = {int(item): user for user in range(6) for item in _events(histories, user)}
    for step in range(batches.steps_per_epoch):
        real = batches[step].items[batches[step].segments > 0]
        assert set(batches.users(step)) == {owner[int(item)] for item in real}


def _events(histories, user):
    return histories.items[histories.offsets[user] : histories.offsets[user + 1]]


def test_the_iterator_resumes_at_its_saved_state():
    data = make_data(np.random.default_rng(1).integers(3, 12, 60))
    iterator = make_iterator(source(data))
    for _ in range(4):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(3)]
    resumed = make_iterator(source(data))
    resumed.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(resumed).items, batch.items)


def test_devices_have_nearly_equal_numbers_of_tokens():
    """Every device has the same number of rows; real tokens differ by little more than one empty row."""
    histories, split = make_data(np.random.default_rng(0).integers(5, 32, 2000))
    source = BatchSource(histories, split, EpochPlan(max_len=20, batch_rows=16, epochs=1, seed=0))
    for step in range(len(source)):
        tokens = (source[step].segments > 0).reshape(8, -1).sum(1)  # of 8 devices with 2 rows each
        assert tokens.max() - tokens.min() <= 20 + 5
