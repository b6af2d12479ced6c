"""Views of packed histories: what each change may and may not do, segment by segment."""

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
    """(row, columns) of every segment."""
    for row, ids in enumerate(np.asarray(batch.segments)):
        for segment in range(1, ids.max(initial=0) + 1):
            yield row, np.flatnonzero(ids == segment)


@functools.cache
def change(**fields):
    config = AugmentConfig(**fields)
    return jax.device_get(jax.jit(lambda b: augment(config, b, KEYS, NEIGHBOURS))(BATCH))


def test_lengths():
    lengths = np.asarray(segment_lengths(jax.tree.map(jnp.asarray, BATCH)))
    for row, columns in segments(BATCH):
        np.testing.assert_array_equal(lengths[row, columns], len(columns))


def test_a_crop_is_one_stretch_that_counts_from_its_start():
    view, firsts = change(crop=0.6), set()
    for row, columns in segments(BATCH):
        segment = BATCH.segments[row, columns[0]]
        kept = np.flatnonzero(view.segments[row] == segment)
        assert len(kept) == max(1, int(0.6 * len(columns) + 1e-6))
        assert set(kept) <= set(columns) and np.all(np.diff(kept) == 1)
        np.testing.assert_array_equal(view.items[row, kept], BATCH.items[row, kept])
        np.testing.assert_array_equal(view.targets[row, kept], BATCH.targets[row, kept])
        np.testing.assert_array_equal(view.positions[row, kept], np.arange(len(kept)))
        firsts.add(kept[0] - columns[0])
    assert len(firsts) > 3
    outside = view.segments == 0
    for x in (view.items, view.targets, view.positions):
        assert not np.any(x[outside])


def test_a_mask_hides_a_share_of_the_items():
    view = change(mask=0.3)
    hidden = (view.items == 0) & (BATCH.items > 0)
    assert 0.2 < hidden.sum() / np.sum(BATCH.items > 0) < 0.4
    np.testing.assert_array_equal(view.items, np.where(hidden, 0, BATCH.items))
    for name in ("targets", "segments", "positions"):
        np.testing.assert_array_equal(getattr(view, name), getattr(BATCH, name))


def test_a_reordered_stretch_tells_no_target():
    numbered = 1 + np.arange(BATCH.items.size).reshape(ROWS, -1)
    batch = BATCH.with_items(np.where(BATCH.items > 0, numbered, 0))
    config = AugmentConfig(reorder=0.6)
    view = jax.device_get(jax.jit(lambda b: augment(config, b, KEYS))(batch))
    num_moved = 0
    for row, columns in segments(batch):
        before, after = batch.items[row, columns], view.items[row, columns]
        np.testing.assert_array_equal(np.sort(after), before)  # of the same segment, ids counting up
        moved = np.flatnonzero(before != after)
        if len(moved):
            assert moved[-1] - moved[0] < int(0.6 * len(columns) + 1e-6)
        num_moved += len(moved)
        for place, target in enumerate(view.targets[row, columns]):
            seen = after[: place + 1]
            if target:
                assert target == batch.targets[row, columns[place]]
                assert set(seen) == set(before[: place + 1])  # all that came before, and nothing later
        assert view.targets[row, columns[-1]] == batch.targets[row, columns[-1]]
    assert num_moved > 50
    for name in ("segments", "positions"):
        np.testing.assert_array_equal(getattr(view, name), getattr(batch, name))


def test_substitutes_are_neighbours():
    view = change(substitute=0.4, num_neighbours=1)
    replaced = view.items != BATCH.items
    assert 0.3 < replaced.sum() / np.sum(BATCH.items > 0) < 0.5
    np.testing.assert_array_equal(view.items[replaced], BATCH.items[replaced] % NUM_ITEMS + 1)
    np.testing.assert_array_equal(view.targets, BATCH.targets)
    half = change(substitute=0.4, num_neighbours=2).items != BATCH.items  # every other has no neighbour
    assert 0.1 < half.sum() / replaced.sum() < 0.9


def test_each_history_gets_one_change():
    both = change(crop=0.6, mask=0.9)
    num_cropped = 0
    for row, columns in segments(BATCH):
        is_cropped = np.any(both.segments[row, columns] == 0)
        is_masked = np.any((both.items == 0)[row, columns] & (both.segments > 0)[row, columns])
        assert not (is_cropped and is_masked)
        num_cropped += is_cropped
    assert 0.2 * ROWS < num_cropped < sum(1 for _ in segments(BATCH)) - 0.2 * ROWS


def test_a_row_keeps_its_draws_wherever_it_lies():
    config, batch = AugmentConfig(reorder=0.6), jax.tree.map(lambda x: x[::-1], BATCH)
    reversed_view = augment(config, batch, KEYS[::-1])
    np.testing.assert_array_equal(np.asarray(reversed_view.items)[::-1], change(reorder=0.6).items)


def test_nearest_items_by_hand():
    # Users {1, 2}, {1, 2, 3}, {1, 3}: cosines of 1 with 2 and 3: 2 / sqrt(6), of 2 with 3: 1/2. Item 4 is in
    # no training.
    items = np.array([1, 2, 1, 2, 3, 1, 3, 4])
    histories = SimpleNamespace(items=items, offsets=np.array([0, 2, 5, 8]), num_items=4, num_users=3)
    split = SimpleNamespace(in_train=lambda _: items != 4)
    nearest = nearest_items(histories, split, 2)
    assert set(nearest[1]) == {2, 3}
    np.testing.assert_array_equal(nearest[[0, 2, 3, 4]], [[0, 0], [1, 3], [1, 2], [0, 0]])


def test_changed_batches_are_the_same_on_every_mesh_and_with_touched_rows():
    config = AugmentConfig(crop=0.6, substitute=0.5, num_neighbours=1)
    fields = {"augment": config, "neighbours": NEIGHBOURS, "model": NO_LAYERS, "steps": 2}
    dense = run("sampled", **fields)
    assert_close(run("sampled", 2, 2, table="sgd", **fields), dense)


def test_mistakes():
    for fields in ({"crop": 1.5}, {"mask": -0.1}, {"num_neighbours": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            AugmentConfig(**fields)
