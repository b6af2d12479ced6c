"""Every method of a batch, with expected values by hand: one row of two segments and one padding token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.data.batch import Batch, select
from rec_jax.data.schema import TIME, Feature

SCHEMA = (
    TIME,
    Feature("device", "id", is_outcome=False, values=("", "phone", "tv")),
    Feature("dwell", "number"),
)
SEGMENTS = [1, 1, 1, 2, 2, 0]
ITEMS, TARGETS = [5, 6, 7, 8, 9, 0], [6, 7, 10, 9, 11, 0]


def ints(*values):
    return np.array([values], np.int32)


def floats(*values):
    return np.array([values], np.float32)


def make_batch(**changes):
    batch = Batch(
        events={
            "item": ints(*ITEMS),
            "time": ints(0, 10, 30, 0, 5, 0),
            "device": ints(1, 2, 1, 2, 1, 0),
            "dwell": floats(0.5, -1, 2, 0.25, 1, 0),
        },
        next={
            "item": ints(*TARGETS),
            "time": ints(10, 30, 60, 5, 8, 0),
            "device": ints(2, 1, 1, 1, 2, 0),
        },
        segments=ints(*SEGMENTS),
        positions=ints(0, 1, 2, 0, 1, 0),
        users={"user": ints(3, 3, 3, 4, 4, 0)},
        labels={"is_liked": floats(1, 0, 1, 1, 0, 0)},
        weights=floats(0.1, 0.2, 0.3, 0.4, 0.5, 0),
        row_ids=np.array([7], np.int32),
        schema=SCHEMA,
    )
    return batch.replace(**changes)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)  # the same columns and schema
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_items_and_targets_are_columns_of_events_and_next():
    batch = make_batch()
    assert batch.items is batch.events["item"] and batch.targets is batch.next["item"]
    other = batch.with_items(ints(1, 1, 1, 1, 1, 0)).with_targets(ints(2, 2, 2, 2, 2, 0))
    assert other.items.max() == 1 and other.targets.max() == 2
    assert_equal(other.with_items(batch.items).with_targets(batch.targets), batch)  # the rest is unchanged


def test_keep_replaces_all_other_tokens_by_padding():
    kept = make_batch().keep(np.array([[False, True, True, False, True, False]]))
    expected = make_batch(
        events={
            "item": ints(0, 6, 7, 0, 9, 0),
            "time": ints(0, 10, 30, 0, 5, 0),
            "device": ints(0, 2, 1, 0, 1, 0),
            "dwell": floats(0, -1, 2, 0, 1, 0),
        },
        next={
            "item": ints(0, 7, 10, 0, 11, 0),
            "time": ints(0, 30, 60, 0, 8, 0),
            "device": ints(0, 1, 1, 0, 2, 0),
        },
        segments=ints(0, 1, 1, 0, 2, 0),
        positions=ints(0, 1, 2, 0, 1, 0),
        users={"user": ints(0, 3, 3, 0, 4, 0)},
        labels={"is_liked": floats(0, 0, 1, 0, 0, 0)},
        weights=floats(0, 0.2, 0.3, 0, 0.5, 0),
    )
    assert_equal(kept, expected)
    query = make_batch(is_query=np.array([[True, True, False, False, False, False]]))
    np.testing.assert_array_equal(query.keep(query.positions > 0).is_query, [[0, 1, 0, 0, 0, 0]])


def test_hide_removes_items_and_outcomes_but_not_context():
    batch = make_batch()
    hidden = batch.hide(np.array([[False, True, False, True, False, False]]))
    events = batch.events | {"item": ints(5, 0, 7, 0, 9, 0), "dwell": floats(0.5, 0, 2, 0, 1, 0)}
    assert_equal(hidden, batch.replace(events=events))


def test_shift_targets_moves_targets_within_their_segment():
    local_ids = {
        "items": {"events": ints(1, 2, 3, 4, 5, 0), "targets": ints(2, 3, 6, 5, 7, 0)},
        "other": {"targets": ints(1, 1, 1, 1, 1, 0)},
    }
    batch = make_batch(local_ids=local_ids)
    shifted = jax.jit(lambda batch: [batch.shift_targets(steps) for steps in range(4)])(batch)
    assert_equal(shifted[0], batch)
    once = batch.replace(
        next={
            "item": ints(7, 10, 0, 11, 0, 0),
            "time": ints(30, 60, 0, 8, 0, 0),
            "device": ints(1, 1, 0, 2, 0, 0),
        },
        weights=floats(0.2, 0.3, 0, 0.5, 0, 0),
        local_ids={
            "items": {"events": ints(1, 2, 3, 4, 5, 0), "targets": ints(3, 6, 0, 7, 0, 0)},
            "other": {"targets": ints(1, 1, 0, 1, 0, 0)},
        },
    )
    assert_equal(shifted[1], once)
    assert_equal(shifted[2], once.shift_targets(1))
    np.testing.assert_array_equal(shifted[2].targets, ints(10, 0, 0, 0, 0, 0))
    assert not shifted[3].targets.any()
    assert make_batch(weights=None).shift_targets(1).weights is None


def test_select_takes_each_token_from_the_chosen_batch():
    batches = [
        make_batch(),
        make_batch().hide(np.array([SEGMENTS]) > 0),
        make_batch().keep(np.array([[False] * 6])),
    ]
    chosen = select(np.array([[0, 0, 0, 1, 1, 2]]), batches)
    events = make_batch().events | {"item": ints(5, 6, 7, 0, 0, 0), "dwell": floats(0.5, -1, 2, 0, 0, 0)}
    assert_equal(chosen, make_batch(events=events))
    for index, batch in enumerate(batches):
        assert_equal(select(np.full((1, 6), index), batches), batch)


def test_map_tokens_moves_weights_users_and_labels():
    reversed_ = make_batch().map_tokens(lambda x: x[:, ::-1])
    np.testing.assert_array_equal(reversed_.weights, floats(0, 0.5, 0.4, 0.3, 0.2, 0.1))
    np.testing.assert_array_equal(reversed_.users["user"], ints(0, 4, 4, 3, 3, 3))
    np.testing.assert_array_equal(reversed_.labels["is_liked"], floats(0, 0, 1, 1, 0, 1))
    np.testing.assert_array_equal(reversed_.next["device"], ints(0, 2, 1, 1, 1, 2))
    np.testing.assert_array_equal(reversed_.row_ids, [7])  # one per row, not per token
    assert reversed_.is_query is None
    assert_equal(reversed_.map_tokens(lambda x: x[:, ::-1]), make_batch())


def test_lookup_ids_are_the_ids_themselves_if_the_whole_table_is_available():
    batch = make_batch(local_ids={"items": {"events": ints(0, 1, 2, 3, 4, 0)}})
    np.testing.assert_array_equal(batch.lookup_ids("items", "events", batch.items), ints(0, 1, 2, 3, 4, 0))
    assert batch.lookup_ids("devices", "events", batch.items) is batch.items
    assert make_batch().lookup_ids("items", "events", batch.items) is batch.items
    with pytest.raises(KeyError, match="negatives"):  # a use whose entries were not read
        batch.lookup_ids("items", "negatives", batch.items)


def test_jit_keeps_all_fields_of_a_batch():
    batch = make_batch(views=(make_batch(), make_batch()))
    traces = []

    @jax.jit
    def flip(batch):
        traces.append(batch.schema)
        return batch.replace(segments=jnp.max(batch.segments) - batch.segments)

    out = flip(flip(batch))
    assert_equal(out, batch)
    assert out.views[1].schema == SCHEMA
    assert traces == [SCHEMA]  # one trace: the schema is part of the type
    flip(batch.replace(schema=()))
    assert len(traces) == 2
