"""A growing id space over a table of a fixed number of rows, for streams that bring new items every day.

    rows_N = vocabulary.rows_of(keys, time)     training: counts, admits, evicts
    rows_N = vocabulary.lookup(keys)            serving and evaluation: changes nothing
    new_U = vocabulary.take_new_rows()          for `rec_jax.tables.embedding.reset_rows`

A key is a whole number or a string (7 and "7" differ); None is missing. Row 0 is padding, and what every key
without a row reads.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# `rows_of` on 100,000 keys, 42,716 of them distinct (zipf(1.1) % 10**7): 0.04 s where all are new, 0.01 s
# (strings 0.02 s) where all have rows. Best of 5 of `python -m timeit -s "import numpy as np; from
# rec_jax.tables.vocabulary import DynamicVocabulary as D; k = np.random.default_rng(0).zipf(1.1, 100_000) %
# 10**7" "D(500_000, evict_after=5).rows_of(k, 0)"`, 2026-11-21, 2 cores of an AMD EPYC (Zen 4).


class DynamicVocabulary:
    """Gives keys rows 1..num_rows - 1 of a table, on the host.

    A key gets a row once it has been seen `admit_after` times. Where no row is free it takes that of a key
    that was not used for more than `evict_after`, the longest unused first; so never one used at the present
    time. An evicted key starts again from zero.

    Keys without a row are counted in at most `max_pending` places. When there are more of them, the same
    number is taken off every count and those that reach 0 are forgotten: a count is never too high, and too
    low by at most (occurrences of keys without a row) / (max_pending + 1).
    Source: Misra & Gries 1982, in the form of Agarwal et al., "Mergeable summaries", PODS'12.

    Attributes:
      refused: how often a key was due a row in a call of `rows_of` and got none.
      evicted: how many keys have lost their row.
    """

    def __init__(
        self, num_rows: int, *, admit_after: int = 1, evict_after: int, max_pending: int = 1_000_000
    ):
        for name, value, least in (
            ("num_rows", num_rows, 2),
            ("admit_after", admit_after, 1),
            ("evict_after", evict_after, 0),
            ("max_pending", max_pending, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least} (DynamicVocabulary)")
        self.num_rows, self.admit_after = num_rows, admit_after
        self.evict_after, self.max_pending = evict_after, max_pending
        self.refused = self.evicted = 0
        self._time = None  # of the last call
        self._row_of = {}  # key -> row
        self._keys = [None]  # of rows 0, 1, ...: those that were ever given
        self._last_used = np.zeros(num_rows, np.int64)
        self._pending = {}  # key -> count, of keys without a row
        self._new_rows = set()

    def __len__(self) -> int:
        """The number of keys that have a row."""
        return len(self._row_of)

    def lookup(self, keys: Sequence | np.ndarray) -> np.ndarray:
        """Rows of N keys, int32[N]; counts and admits nothing."""
        keys_U, place_N, _ = _distinct(keys)
        return self._read(keys_U)[place_N]

    def rows_of(self, keys: Sequence | np.ndarray, time: int) -> np.ndarray:
        """Rows of N keys seen at `time`, int32[N], after all of them have been counted.

        Where rows run out, the keys seen most often get theirs, the first in `keys` among equals.
        time: a whole number in the unit of `evict_after`, no less than in the call before.
        """
        if time != int(time):
            raise ValueError(f"time={time} must be a whole number (DynamicVocabulary)")
        if self._time is not None and time < self._time:
            raise ValueError(f"time={time} is before the last call's, {self._time} (DynamicVocabulary)")
        keys_U, place_N, counts_U = _distinct(keys)
        self._time = int(time)
        rows_U = self._read(keys_U)
        self._last_used[rows_U] = time
        due = []
        for i in np.flatnonzero(rows_U[: len(keys_U)] == 0).tolist():
            key = keys_U[i]
            self._pending[key] = self._pending.get(key, 0) + counts_U[i]
            if self._pending[key] >= self.admit_after:
                due.append(i)
        due.sort(key=lambda i: -self._pending[keys_U[i]])
        rows = self._free_rows(len(due))
        for i, row in zip(due, rows, strict=False):
            rows_U[i] = row
            self._keys[row] = keys_U[i]
            self._row_of[keys_U[i]] = row
            del self._pending[keys_U[i]]
        self.refused += len(due) - len(rows)
        self._forget_rare()
        return rows_U[place_N]

    def take_new_rows(self) -> np.ndarray:
        """Rows given to another key since this was last called, int32, ascending."""
        rows, self._new_rows = np.array(sorted(self._new_rows), np.int32), set()
        return rows

    def _read(self, keys_U: list) -> np.ndarray:
        """int32[U + 1]; the last is row 0, which missing keys read."""
        return np.array([self._row_of.get(key, 0) for key in keys_U] + [0], np.int32)

    def _free_rows(self, num: int) -> list[int]:
        """Up to `num` rows, used now: those never given, then those of keys that are evicted."""
        first = len(self._keys)
        rows = list(range(first, min(first + num, self.num_rows)))
        self._keys += [None] * len(rows)
        self._last_used[rows] = self._time
        if len(rows) < num:
            old = 1 + np.flatnonzero(self._time - self._last_used[1:] > self.evict_after)
            old = old[np.argsort(self._last_used[old], kind="stable")][: num - len(rows)].tolist()
            for row in old:
                del self._row_of[self._keys[row]]
            self._last_used[old] = self._time
            self.evicted += len(old)
            rows += old
        self._new_rows.update(rows)
        return rows

    def _forget_rare(self):
        if len(self._pending) > self.max_pending:
            counts = np.fromiter(self._pending.values(), np.int64, len(self._pending))
            cut = int(-np.partition(-counts, self.max_pending)[self.max_pending])
            self._pending = {key: count - cut for key, count in self._pending.items() if count > cut}

    def state_dict(self) -> dict:
        """All there is to know, as JSON can hold it."""
        return {
            "num_rows": self.num_rows,
            "admit_after": self.admit_after,
            "evict_after": self.evict_after,
            "max_pending": self.max_pending,
            "refused": self.refused,
            "evicted": self.evicted,
            "time": self._time,
            "keys": self._keys[1:],
            "last_used": self._last_used[1 : len(self._keys)].tolist(),
            "pending": [[key, count] for key, count in self._pending.items()],
            "new_rows": sorted(self._new_rows),
        }

    @classmethod
    def from_state_dict(cls, state: dict) -> "DynamicVocabulary":
        """The vocabulary whose `state_dict` this was."""
        settings = {name: state[name] for name in ("num_rows", "admit_after", "evict_after", "max_pending")}
        vocabulary = cls(**settings)
        vocabulary.refused, vocabulary.evicted = state["refused"], state["evicted"]
        vocabulary._time = state["time"]
        vocabulary._keys += state["keys"]
        vocabulary._row_of = {key: row for row, key in enumerate(vocabulary._keys) if row}
        vocabulary._last_used[1 : len(vocabulary._keys)] = state["last_used"]
        vocabulary._pending = {key: count for key, count in state["pending"]}
        vocabulary._new_rows = set(state["new_rows"])
        return vocabulary


def _distinct(keys) -> tuple[list, np.ndarray, list]:
    """(U distinct keys in order of appearance; int32[N], where each key is among them, -1 if missing; how
    often each occurs)."""
    # Hashing is faster than the sort of np.unique, and NumPy's strings drop trailing NULs.
    try:
        column = pa.array(keys)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"keys must be all whole numbers of 64 bits or all strings: {error}") from None
    kind = column.type
    if pa.types.is_null(kind):
        return [], np.full(len(column), -1, np.int32), []
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"keys of type {kind} must be whole numbers or strings (DynamicVocabulary)")
    encoded = column.dictionary_encode()
    place_N = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    counts = np.bincount(place_N[place_N >= 0], minlength=len(encoded.dictionary))
    return encoded.dictionary.to_pylist(), place_N, counts.tolist()
