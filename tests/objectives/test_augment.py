"""Augmented views of packed histories: properties of each augmentation, segment by segment."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_runs import NO_LAYERS, NUM_ITEMS, assert_close, make_batch, run

from rec_jax.hashing import row_keys
from rec_jax.models.baselines import nearest_items
from rec_jax.objectives.augment import AugmentConfig, augment, segment_lengths

ROWS = 64
BATCH = make_batch(seed=3, rows=ROWS)
KEYS = row_keys(jnp.uint32(7), jnp.arange(ROWS))
NEIGHBOURS = jnp.asarray([[0, 0]] + [[v % NUM_ITEMS + 1, 0] for v in range(1, NUM_ITEMS + 1)])


def segments(batch):
    """Yields (row, columns) of every segment."""
    for row, ids in enumerate(np.asarray(batch.segments)):
        for segment in range(1, ids.max(initial=0) + 1):
            yield row, np.flatnonzero(ids == segment)


@functools.cache
def jitted(config):
    return jax.jit(lambda batch, key_B: augment(config, batch, key_B, NEIGHBOURS))


def view_of(batch=BATCH, key_B=KEYS, **fields):
    """Returns an augmented view of the batch. fields: of AugmentConfig."""
    return jax.device_get(jitted(AugmentConfig(**fields))(batch, key_B))


def test_segment_lengths():
    lengths = np.asarray(segment_lengths(jax.tree.map(jnp.asarray, BATCH)))
    for row, columns in segments(BATCH):
        np.testing.assert_array_equal(lengths[row, columns], len(columns))


def test_crop_keeps_one_span_with_positions_from_zero():
    view, starts = view_of(crop=0.6), set()
    for row, columns in segments(BATCH):
        segment = BATCH.segments[row, columns[0]]
        kept = np.flatnonzero(view.segments[row] == segment)
        assert len(kept) == max(1, int(0.6 * len(columns) + 1e-6))
        assert set(kept) <= set(columns) and np.all(np.diff(kept) == 1)
        np.testing.assert_array_equal(view.items[row, kept], BATCH.items[row, kept])
        np.testing.assert_array_equal(view.targets[row, kept], BATCH.targets[row, kept])
        np.testing.assert_array_equal(view.positions[row, kept], np.arange(len(kept)))
        starts.add(kept[0] - columns[0])
    assert len(starts) > 3
    outside = view.segments == 0
    for x in (view.items, view.targets, view.positions):
        assert not np.any(x[outside])


def test_mask_hides_a_share_of_the_items():
    view = view_of(mask=0.3)
    hidden = (view.items == 0) & (BATCH.items > 0)
    assert 0.2 < hidden.sum() / np.sum(BATCH.items > 0) < 0.4
    np.testing.assert_array_equal(view.items, np.where(hidden, 0, BATCH.items))
    for name in ("targets", "segments", "positions"):
        np.testing.assert_array_equal(getattr(view, name), getattr(BATCH, name))


def test_reorder_shuffles_one_span_and_removes_revealed_targets():
    numbered = (1 + np.arange(BATCH.items.size, dtype=np.int32)).reshape(ROWS, -1)
    batch = BATCH.with_items(np.where(BATCH.items > 0, numbered, 0))
    view = view_of(batch, reorder=0.6)
    num_moved = 0
    for row, columns in segments(batch):
        before, after = batch.items[row, columns], view.items[row, columns]
        np.testing.assert_array_equal(np.sort(after), before)  # the same items; ids of `before` increase
        moved = np.flatnonzero(before != after)
        if len(moved):
            assert moved[-1] - moved[0] < int(0.6 * len(columns) + 1e-6)
        num_moved += len(moved)
        for index, target in enumerate(view.targets[row, columns]):
            if target:
                assert target == batch.targets[row, columns[index]]
                assert set(after[: index + 1]) == set(before[: index + 1])  # no later item comes before
        assert view.targets[row, columns[-1]] == batch.targets[row, columns[-1]]
    assert num_moved > 50
    for name in ("segments", "positions"):
        np.testing.assert_array_equal(getattr(view, name), getattr(batch, name))


def test_substitutes_are_neighbours():
    view = view_of(substitute=0.4, num_neighbours=1)
    replaced = view.items != BATCH.items
    assert 0.3 < replaced.sum() / np.sum(BATCH.items > 0) < 0.5
    np.testing.assert_array_equal(view.items[replaced], BATCH.items[replaced] % NUM_ITEMS + 1)
    np.testing.assert_array_equal(view.targets, BATCH.targets)
    half = view_of(substitute=0.4, num_neighbours=2).items != BATCH.items  # the second neighbour is 0 = none
    assert 0.1 < half.sum() / replaced.sum() < 0.9


def test_each_history_gets_one_augmentation():
    view = view_of(crop=0.6, mask=0.9)
    num_cropped = 0
    for row, columns in segments(BATCH):
        is_cropped = np.any(view.segments[row, columns] == 0)
        is_masked = np.any((view.items == 0)[row, columns] & (view.segments > 0)[row, columns])
        assert not (is_cropped and is_masked)
        num_cropped += is_cropped
    assert 0.2 * ROWS < num_cropped < sum(1 for _ in segments(BATCH)) - 0.2 * ROWS


def test_draws_of_a_row_depend_on_its_key_only():
    reversed_view = view_of(jax.tree.map(lambda x: x[::-1], BATCH), KEYS[::-1], reorder=0.6)
    np.testing.assert_array_equal(reversed_view.items[::-1], view_of(reorder=0.6).items)


def test_nearest_items_by_hand():
    # Histories {1, 2}, {1, 2, 3}, {1, 3}: the cosine of item 1 with 2 and with 3 is 2 / sqrt(6), and that of
    # 2 with 3 is 1/2. Item 4 is not in the training data.
    items = np.array([1, 2, 1, 2, 3, 1, 3, 4])
    histories = SimpleNamespace(items=items, offsets=np.array([0, 2, 5, 8]), num_items=4, num_users=3)
    split = SimpleNamespace(in_train=lambda _: items != 4)
    nearest = nearest_items(histories, split, 2)
    assert set(nearest[1]) == {2, 3}
    np.testing.assert_array_equal(nearest[[0, 2, 3, 4]], [[0, 0], [1, 3], [1, 2], [0, 0]])


def test_augmented_steps_are_the_same_on_meshes_and_with_sparse_updates():
    config = AugmentConfig(crop=0.6, substitute=0.5, num_neighbours=1)
    fields = {"augment": config, "neighbours": NEIGHBOURS, "model": NO_LAYERS, "steps": 2}
    dense = run("sampled", **fields)
    assert_close(run("sampled", 2, 2, table="sgd", **fields), dense)


def test_invalid_configs_are_refused():
    for fields in ({"crop": 1.5}, {"mask": -0.1}, {"num_neighbours": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            AugmentConfig(**fields)
