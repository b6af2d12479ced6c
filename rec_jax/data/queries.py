"""Queries: histories whose next event is to be predicted, the input of every ranker."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rec_jax.data.histories import ranges


@dataclass(frozen=True)
class Queries:
    """History b is column[starts[b]:ends[b]] of each column, oldest event first. Nothing is copied.

    columns: {"item": int32[N], "time": int64[N] seconds (if known), ...features}, shared by all histories.
    starts, ends: int64[B]. users: int64[B] users of the log; None if the histories are not of its users.
    Raises ValueError for an empty history.
    """

    columns: dict[str, np.ndarray]
    starts: np.ndarray
    ends: np.ndarray
    users: np.ndarray | None = None

    def __post_init__(self):
        if len(self) and self.lengths.min() < 1:
            raise ValueError(
                f"history {int(np.argmin(self.lengths))} of the batch is empty: give it at least one event"
            )

    @classmethod
    def of(cls, histories, users, ends=None) -> "Queries":
        """The histories of users of the log, up to `ends` as in `Examples`; None = all of their events."""
        users = np.asarray(users, np.int64)
        ends = histories.offsets[users + 1] if ends is None else np.asarray(ends, np.int64)
        return cls(histories.columns, histories.offsets[users], ends, users)

    @classmethod
    def one(cls, items, times=None) -> "Queries":
        """One history with the given items, oldest first. times: the seconds of the events, if known."""
        columns = {"item": np.asarray(items, np.int32)}
        if times is not None:
            columns["time"] = np.asarray(times, np.int64)
        return cls(columns, np.array([0]), np.array([len(columns["item"])]))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index) -> "Queries":
        """Some of the histories, by indices or a slice."""
        users = None if self.users is None else self.users[index]
        return Queries(self.columns, self.starts[index], self.ends[index], users)

    @property
    def lengths(self) -> np.ndarray:
        return self.ends - self.starts

    def tiles(self, max_rows: int, max_events: int) -> Iterator[np.ndarray]:
        """Yields the indices of consecutive histories: at most `max_rows` histories with `max_events` events
        per tile, but at least one history. If a history extends the one before it, only its additional events
        are counted."""
        extends = np.zeros(len(self), bool)
        extends[1:] = (self.starts[1:] == self.starts[:-1]) & (self.ends[1:] >= self.ends[:-1])
        added = np.where(extends, self.ends - np.append(0, self.ends[:-1]), self.lengths)
        total = np.cumsum(added)
        first = 0
        while first < len(self):
            before = total[first] - self.lengths[first]
            last = np.searchsorted(total, before + max_events, side="right")
            last = int(np.clip(last, first + 1, first + max(1, max_rows)))
            yield np.arange(first, min(last, len(self)))
            first = last

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (queries int64[P], items int32[P]): one pair for each distinct item of each history."""
        return self._distinct()[:2]

    def item_counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (queries, items, counts int64[P]): the pairs of `seen`, and how many events each has."""
        queries, items, ordered, first, ends = self._distinct()
        return queries, items, np.searchsorted(ordered, ends) - first

    def _distinct(self):
        """Returns (queries[P], items[P], ordered, first[P], ends[P]).

        `ordered` has one integer per event, sorted by (start, item, index). The events of a pair begin at
        ordered[first] and are below the value `ends`.

        Histories with the same start share their events: a history contains the items whose first event is
        before its end. So memory grows with the longest history of each start and with the number of pairs.
        """
        starts_G, group_B = np.unique(self.starts, return_inverse=True)
        lengths_G = np.zeros(len(starts_G), np.int64)
        np.maximum.at(lengths_G, group_B, self.lengths)
        items = self.columns["item"][ranges(starts_G, lengths_G)]
        key = np.repeat(np.arange(len(starts_G)), lengths_G) * (int(items.max(initial=0)) + 1) + items
        bits = len(key).bit_length()
        if int(key.max(initial=0)).bit_length() + bits > 63:
            raise ValueError(
                f"{len(key):,} events of {len(starts_G):,} histories are too many for one call: pass fewer "
                "histories"
            )
        ordered = np.sort(key << bits | np.arange(len(key)))  # several times as fast as an argsort
        first = np.flatnonzero(np.diff(ordered >> bits, prepend=-1))
        index = ordered[first] & ((1 << bits) - 1)
        by_index = np.argsort(index)
        first, index = first[by_index], index[by_index]
        offset_B = (np.cumsum(lengths_G) - lengths_G)[group_B]
        low_B, high_B = np.searchsorted(index, offset_B), np.searchsorted(index, offset_B + self.lengths)
        queries, pairs = np.repeat(np.arange(len(self)), high_B - low_B), ranges(low_B, high_B - low_B)
        first = first[pairs]
        ends = ordered[first] >> bits << bits | (offset_B + self.lengths)[queries]
        return queries, items[index[pairs]], ordered, first, ends
