"""Queries: tiles, and the items of each history, compared with loops."""

from collections import Counter

import numpy as np
import pytest

from rec_jax.data.histories import Histories
from rec_jax.data.queries import Queries

ITEMS = np.random.default_rng(0).integers(1, 8, 60).astype(np.int32)


def some_queries(seed, num=12):
    """Queries in random order; some share a start, some an end."""
    rng = np.random.default_rng(seed)
    starts = rng.choice([0, 5, 20, 31], num)
    return Queries({"item": ITEMS}, starts, np.minimum(starts + rng.integers(1, 40, num), 60))


@pytest.mark.parametrize("seed", range(5))
def test_items_of_each_history_equal_a_loop(seed):
    queries = some_queries(seed)
    numbers, items, counts = queries.item_counts()
    for query, (start, end) in enumerate(zip(queries.starts, queries.ends, strict=True)):
        is_own = numbers == query
        counted = dict(zip(items[is_own].tolist(), counts[is_own].tolist(), strict=True))
        assert counted == Counter(ITEMS[start:end].tolist())
    for one, other in zip(queries.seen(), (numbers, items), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "max_rows, max_events", [(100, 1000), (3, 1000), (100, 30), (2, 30), (100, 1), (0, 0)]
)
@pytest.mark.parametrize("in_order", [True, False])
def test_tiles_contain_all_queries_and_respect_the_limits(max_rows, max_events, in_order):
    queries = some_queries(1, 30)
    if in_order:
        queries = queries[np.lexsort((queries.ends, queries.starts))]
    tiles = list(queries.tiles(max_rows, max_events))
    np.testing.assert_array_equal(np.concatenate(tiles), np.arange(30))
    for tile in tiles:
        assert 1 <= len(tile) <= max(1, max_rows)
        part = queries[tile]
        num_events = sum(int(part.ends[part.starts == start].max() - start) for start in set(part.starts))
        assert len(tile) == 1 or num_events <= max_events
    if in_order and (max_rows, max_events) == (100, 1000):
        assert len(tiles) == 1  # shared events count once: 180 at most
    if in_order and max_rows == 100 and max_events == 30:  # no tile could also take the next query
        for tile in tiles[:-1]:
            larger = queries[np.append(tile, tile[-1] + 1)]
            assert (
                sum(int(larger.ends[larger.starts == s].max() - s) for s in set(larger.starts)) > max_events
            )


def test_queries_are_made_from_a_log_or_from_items():
    log = Histories(
        items=ITEMS,
        times=np.arange(60),
        offsets=np.array([0, 20, 60]),
        user_ids=np.array(["a", "b"]),
        item_ids=np.arange(8).astype(str),
        features={"place": np.arange(60) % 3},
    )
    queries = Queries.of(log, [1, 0])
    assert queries.starts.tolist() == [20, 0] and queries.ends.tolist() == [60, 20]
    assert set(queries.columns) == {"item", "time", "place"}
    assert queries[1:].users.tolist() == [0]
    assert Queries.of(log, [1], [25]).lengths.tolist() == [5]
    assert set(Queries.one([3, 4], [7, 9]).columns) == {"item", "time"}


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="history 0 of the batch is empty"):
        Queries.one([])
    with pytest.raises(ValueError, match="history 1 of the batch is empty"):
        Queries({"item": ITEMS}, np.array([0, 5]), np.array([1, 5]))


def test_too_many_queries_are_refused():
    columns = {"item": np.full(2**20, 2**31 - 1, np.int32)}
    starts = np.arange(2**14)
    with pytest.raises(
        ValueError, match="1,032,192 events of 16,384 histories are too many for one call: pass fewer"
    ):
        Queries(columns, starts, starts + 63).seen()
