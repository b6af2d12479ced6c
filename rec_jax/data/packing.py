"""Packing: assigns histories to rows of a fixed length.

A training example is a history's inputs items[:-1] and targets items[1:], cut to its last `row_len`
targets. Packing puts several examples into one row, distinguished by segment ids, so that little of the
computation is spent on padding (an average Amazon Beauty history fills a ninth of its padded row).

Packing depends only on lengths, which do not change between epochs. So the bins are made once. Each epoch
permutes users of equal length, and the order of the rows: all epochs have the same number of steps, and any
batch of any epoch can be built without the ones before it.
"""

from dataclasses import dataclass

import numpy as np

from rec_jax.data.batch import Batch
from rec_jax.data.histories import ranges
from rec_jax.data.schema import Schema


@dataclass(frozen=True)
class PackingPlan:
    """Slots of given lengths in rows. Row r has the slots row_starts[r]:row_starts[r + 1], longest first."""

    row_len: int
    slot_len: np.ndarray  # int32 [num_slots]: tokens of each slot, one slot per user
    row_starts: np.ndarray  # int64 [num_rows + 1]
    users_by_len: np.ndarray  # int32 [num_slots]: users by length, longest first
    slots_by_len: np.ndarray  # int64 [num_slots]: slots by length, longest first

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def fill(self) -> float:
        """The share of the tokens in all rows that are not padding."""
        return float(self.slot_len.sum() / max(1, self.num_rows * self.row_len))


def plan_packing(num_tokens: np.ndarray, row_len: int) -> PackingPlan:
    """Packs lengths into rows by best-fit decreasing.

    num_tokens: int[U], the targets of each user, cut to `row_len`; users without targets get no slot.
    Raises ValueError if no user has targets.
    """
    lengths = np.minimum(np.asarray(num_tokens), row_len)
    users = np.flatnonzero(lengths > 0)
    if users.size == 0:
        raise ValueError(
            "no user has two or more training events, so there is nothing to learn: use a larger log, or "
            "weaker cleaning rules"
        )
    users = users[np.argsort(-lengths[users], kind="stable")]
    # remaining[l] users of length l have no slot yet. Rows with equal contents are made together.
    remaining = np.bincount(lengths[users], minlength=row_len + 1)
    rows: list[list[int]] = []
    while remaining.any():
        row, room = [], row_len
        while (length := _longest(remaining, room)) > 0:
            take = min(room // length, remaining[length])
            remaining[length] -= take
            row += [length] * take
            room -= length * take
        rows.append(row)
        counts = np.bincount(row, minlength=row_len + 1)
        used = counts > 0
        repeat = int((remaining[used] // counts[used]).min())
        remaining -= repeat * counts
        rows += [row] * repeat
    slot_len = np.array([length for row in rows for length in row], np.int32)
    row_starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    slots = np.argsort(-slot_len, kind="stable")
    return PackingPlan(row_len, slot_len, row_starts, users.astype(np.int32), slots)


def _longest(remaining: np.ndarray, room: int) -> int:
    """Returns the greatest length up to `room` with remaining users, or 0."""
    fitting = np.flatnonzero(remaining[: room + 1])
    return int(fitting[-1]) if fitting.size else 0


def shuffled_users(plan: PackingPlan, rng: np.random.Generator) -> np.ndarray:
    """Returns the user of every slot, int32[num_slots]: a random permutation of the users of each length."""
    shuffled = rng.permutation(plan.users_by_len.size)
    lengths = plan.slot_len[plan.slots_by_len]
    shuffled = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    users = np.empty_like(plan.users_by_len)
    users[plan.slots_by_len] = plan.users_by_len[shuffled]
    return users


def fill_rows(columns: dict, plan: PackingPlan, rows, slot_users, ends, num_rows: int, schema: Schema = ()):
    """Builds a `Batch` of packed rows, as NumPy arrays. Tokens without an event are 0.

    columns: {"item": int32[N], and a column for each feature of the schema} with all events, in CSR order.
    rows: int[R], row numbers of the plan, R <= num_rows. slot_users: the user of each slot. ends: int64[U],
    the index into the columns just after each user's last input. Targets are the events after the inputs.
    """
    first, counts = plan.row_starts[rows], np.diff(plan.row_starts)[rows]
    slots = ranges(first, counts)
    lengths = plan.slot_len[slots].astype(np.int64)
    starts = np.cumsum(lengths) - lengths  # of each slot, in tokens of this batch
    row_of_slot = np.repeat(np.arange(len(rows)), counts)
    first_of_row = np.cumsum(counts) - counts
    in_row = starts - starts[first_of_row][row_of_slot]
    tokens = ranges(row_of_slot * plan.row_len + in_row, lengths)
    # The last input of the log may have no event after it.
    last = len(columns["item"]) - 1
    source = np.minimum(ranges(ends[slot_users[slots]] - lengths, lengths), last)
    following = np.minimum(source + 1, last)
    segment = np.arange(len(slots)) - first_of_row[row_of_slot] + 1

    def filled(values, dtype=np.int32):
        array = np.zeros((num_rows, plan.row_len), dtype)
        array.reshape(-1)[tokens] = values
        return array

    def feature_column(feature, events):
        values = columns[feature.name][events]
        if feature.kind == "time":  # seconds since the first event of the segment, 68 years at most
            values = values - np.repeat(columns[feature.name][source[starts]], lengths)
            values = np.minimum(values, np.iinfo(np.int32).max)
        return filled(feature.encode(values), feature.dtype)

    return Batch(
        events={"item": filled(columns["item"][source])}
        | {f.name: feature_column(f, source) for f in schema},
        next={"item": filled(columns["item"][following])}
        | {f.name: feature_column(f, following) for f in schema if not f.is_outcome},
        segments=filled(np.repeat(segment, lengths)),
        positions=filled(ranges(np.zeros_like(lengths), lengths)),
        schema=schema,
    )
