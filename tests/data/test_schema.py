"""Features of events: codes and normalised numbers, fitted to the training part only."""

import dataclasses

import numpy as np
import pytest
from test_histories import make_log

from rec_jax.data.histories import Histories, build_histories, leave_one_out
from rec_jax.data.schema import TIME, Feature, make_schema

# Two users, in time order. The last event of each is held out for test, the one before it for validation.
ROWS = [(0, 1, 10), (0, 2, 20), (0, 3, 30), (0, 1, 40), (1, 2, 10), (1, 3, 20), (1, 1, 30), (1, 2, 40)]
DWELL = np.array([1.0, 3.0, 1e6, -1e6, 5.0, np.nan, 1e6, -1e6])
DEVICE = np.array(["tv", "", "phone", "tv", "phone", "tv", "watch", "tv"], object)
IN_TRAIN = [0, 1, 4, 5]


def make_histories(rows=ROWS, **features):
    return build_histories(make_log(rows, features=features or {"device": DEVICE, "dwell": DWELL}))


def schema_of(histories, **fields):
    return make_schema(histories, leave_one_out(histories), **fields)


def test_numbers_are_normalised_and_missing_ones_become_the_mean():
    feature = Feature("dwell", "number", mean=3.0, std=2.0)
    encoded = feature.encode(np.array([1.0, np.nan, 3.0, 8.0]))
    np.testing.assert_array_equal(encoded, [-1, 0, 0, 2.5])
    assert encoded.dtype == np.float32 and feature.missing == 0 and feature.missing.dtype == np.float32
    big = Feature("number", "number", mean=1e9, std=1.0)  # different only in f64
    np.testing.assert_array_equal(big.encode(np.array([1e9 - 1, 1e9 + 2])), [-1, 2])
    assert feature.encode(np.array([])).dtype == np.float32


def test_codes_and_times_are_not_encoded():
    feature = Feature("device", "id", values=("", "phone", "tv"))
    codes = np.array([2, 0, 1], np.int32)
    assert feature.encode(codes) is codes and feature.num_ids == 2
    assert feature.missing == 0 and feature.dtype == np.int32
    times = np.array([1_700_000_000_000], np.int64)
    assert TIME.encode(times) is times and TIME.missing == 0 and not TIME.is_outcome


def test_a_schema_has_times_and_every_column_of_the_log():
    schema = schema_of(make_histories(), context=("device",))
    mean, std = 3.0, np.std([1.0, 3.0, 5.0])  # of the training numbers that are not missing
    assert schema == (
        TIME,
        Feature("device", "id", is_outcome=False, values=("", "phone", "tv", "watch")),
        Feature("dwell", "number", is_outcome=True, mean=mean, std=float(std)),
    )
    assert all(feature.is_outcome for feature in schema_of(make_histories())[1:])
    without_times = [(user, item, None) for user, item, _ in ROWS]
    assert [feature.name for feature in schema_of(make_histories(without_times))] == ["device", "dwell"]
    assert schema_of(make_histories(dwell=DWELL))[1].std == pytest.approx(std)


def test_held_out_numbers_do_not_change_the_schema():
    held_out = np.setdiff1d(np.arange(len(ROWS)), IN_TRAIN)
    changed = DWELL.copy()
    changed[held_out] = [np.nan, 7, np.nan, 1e300]
    assert schema_of(make_histories(device=DEVICE, dwell=changed)) == schema_of(make_histories())
    changed[IN_TRAIN[0]] += 1
    assert schema_of(make_histories(device=DEVICE, dwell=changed)) != schema_of(make_histories())


@pytest.mark.parametrize("value, mean", [(4.0, 4.0), (np.nan, 0.0)], ids=["constant", "missing"])
def test_a_constant_column_is_not_scaled(value, mean):
    _, feature = schema_of(make_histories(dwell=np.full(len(ROWS), value)))
    assert (feature.mean, feature.std) == (mean, 1.0)
    np.testing.assert_array_equal(feature.encode(np.array([value, mean + 2])), [0, 2])


def test_context_without_a_column_is_refused():
    with pytest.raises(ValueError, match="context=.*: place, when not in the features .device, dwell.: add"):
        schema_of(make_histories(), context=("when", "device", "place"))
    bare = build_histories(make_log(ROWS))
    with pytest.raises(ValueError, match=r"device not in the features \(none\): add the column"):
        schema_of(bare, context=("device",))


def test_texts_and_their_codes_are_saved_and_loaded(tmp_path):
    texts = np.array(["tv", "", "Ünï", "b\nc", "", "tv", 'say "x"', "b\nc"], object)
    histories = make_histories(device=texts, dwell=DWELL)
    assert histories.feature_values == {"device": ("", "b\nc", 'say "x"', "tv", "Ünï")}
    histories.save(tmp_path / "h")
    loaded = Histories.load(tmp_path / "h")
    assert loaded.feature_values == histories.feature_values
    assert loaded.features["device"].dtype == np.int32
    for name, column in histories.columns.items():
        np.testing.assert_array_equal(loaded.columns[name], column)
    assert schema_of(loaded) == schema_of(histories)
    values = np.array(loaded.feature_values["device"], object)
    assert values[loaded.features["device"]].tolist() == texts.tolist()


def test_code_zero_is_reserved_for_missing_values():
    full = np.array(list("abcdabcd"), object)
    histories = make_histories(device=full)
    assert histories.feature_values["device"] == ("", "a", "b", "c", "d")
    assert histories.features["device"].tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    none = make_histories(device=np.array([""] * len(ROWS), object))
    assert none.feature_values["device"] == ("",) and none.features["device"].tolist() == [0] * len(ROWS)
    assert schema_of(none)[1].num_ids == 0


def test_columns_are_item_time_and_features():
    histories = make_histories()
    assert list(histories.columns) == ["item", "time", "device", "dwell"]
    assert histories.columns["item"] is histories.items
    assert list(dataclasses.replace(histories, times=None, features={}).columns) == ["item"]
