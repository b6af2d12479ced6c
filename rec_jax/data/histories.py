"""Histories: every user's events in time order, as memory-mapped CSR files, and their splits."""

import hashlib
import json
import pathlib
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Histories:
    """The events of user u are items[offsets[u]:offsets[u + 1]], oldest first.

    items: int32[N] in 1..V, an array or a memory map. times: int64[N] seconds UTC, or None.
    offsets: int64[U + 1]. user_ids: str[U] and item_ids: str[V + 1] are the ids of the log;
    item_ids[0] == "" is padding. titles: item id -> title, where known.
    """

    items: np.ndarray
    times: np.ndarray | None
    offsets: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    titles: dict[str, str] = field(default_factory=dict)

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.item_ids) - 1

    @property
    def num_events(self) -> int:
        return len(self.items)

    def save(self, directory: pathlib.Path) -> None:
        """Writes the arrays; `load` maps them into memory."""
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / "items.npy", np.asarray(self.items, np.int32))
        np.save(directory / "offsets.npy", self.offsets)
        if self.times is not None:
            np.save(directory / "times.npy", self.times)
        vocabulary = {
            "user_ids": [str(x) for x in self.user_ids],
            "item_ids": [str(x) for x in self.item_ids],
            "titles": self.titles,
        }
        (directory / "vocabulary.json").write_text(json.dumps(vocabulary))

    @classmethod
    def load(cls, directory: pathlib.Path) -> "Histories":
        vocabulary = json.loads((directory / "vocabulary.json").read_text())
        times = directory / "times.npy"
        return cls(
            items=np.load(directory / "items.npy", mmap_mode="r"),
            times=np.load(times, mmap_mode="r") if times.exists() else None,
            offsets=np.load(directory / "offsets.npy"),
            user_ids=np.array(vocabulary["user_ids"]),
            item_ids=np.array(vocabulary["item_ids"]),
            titles=vocabulary["titles"],
        )


def build_histories(log, titles: dict[str, str] | None = None) -> Histories:
    """Sorts a log by (user, time); events of equal time keep their order in the file."""
    keys = (log.users,) if log.times is None else (log.times, log.users)
    order = np.lexsort(keys)
    counts = np.bincount(log.users, minlength=len(log.user_ids))
    return Histories(
        items=log.items[order].astype(np.int32),
        times=None if log.times is None else log.times[order],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        user_ids=log.user_ids,
        item_ids=log.item_ids,
        titles=titles or {},
    )


@dataclass(frozen=True)
class Split:
    """Where each user's training and validation parts end, as indices into `Histories.items`.

    Training is items[offsets[u]:train_end[u]], validation targets items[train_end[u]:val_end[u]], test
    targets items[val_end[u]:offsets[u + 1]]. checksum: sha256 over events, offsets and bounds: equal
    checksums are equal splits of equal data.
    """

    kind: str
    train_end: np.ndarray
    val_end: np.ndarray
    checksum: str
    notes: dict[str, int]

    def in_train(self, histories) -> np.ndarray:
        """bool[N]: is the event in the training part?"""
        return np.arange(histories.num_events) < np.repeat(
            self.train_end, np.diff(histories.offsets)
        )

    def train_item_counts(self, histories) -> np.ndarray:
        """int64[V + 1]: training events of each item."""
        train_items = np.asarray(histories.items)[self.in_train(histories)]
        return np.bincount(train_items, minlength=histories.num_items + 1)

    def save(self, directory: pathlib.Path) -> None:
        np.save(directory / "train_end.npy", self.train_end)
        np.save(directory / "val_end.npy", self.val_end)
        about = {"kind": self.kind, "checksum": self.checksum, "notes": self.notes}
        (directory / "split.json").write_text(json.dumps(about, indent=1))

    @classmethod
    def load(cls, directory: pathlib.Path, histories: Histories) -> "Split":
        """Raises ValueError if the files are not what the checksum was taken of."""
        about = json.loads((directory / "split.json").read_text())
        train_end, val_end = (np.load(directory / f"{x}_end.npy") for x in ("train", "val"))
        if _checksum(histories, train_end, val_end) != about["checksum"]:
            raise ValueError(
                f"{directory} is damaged: its events and split do not have the checksum in split.json. "
                "Delete it and prepare the data again"
            )
        return cls(about["kind"], train_end, val_end, about["checksum"], about["notes"])


def _checksum(histories, train_end, val_end) -> str:
    digest = hashlib.sha256()
    for array in (histories.items, histories.offsets, train_end, val_end):
        digest.update(np.ascontiguousarray(array).astype("<i8").tobytes())
    return digest.hexdigest()


def _make_split(kind, histories, train_end, val_end, notes) -> Split:
    return Split(kind, train_end, val_end, _checksum(histories, train_end, val_end), notes)


def leave_one_out(histories: Histories) -> Split:
    """The last event of each user is the test, the one before it the validation.

    Users with fewer than three events are for training only, and counted.
    """
    ends = histories.offsets[1:]
    enough = np.diff(histories.offsets) >= 3
    notes = {"users": histories.num_users, "users with < 3 events (training only)": int((~enough).sum())}
    return _make_split("leave_one_out", histories, ends - 2 * enough, ends - enough, notes)


def global_temporal(histories: Histories, val_time: int, test_time: int) -> Split:
    """Training before `val_time`, validation before `test_time`, test from then on (seconds UTC).

    No training event is as late as any held-out one, whoever's it is. An event at a cut belongs to the
    later part. Raises ValueError without times, or if a part is empty.
    """
    if histories.times is None:
        raise ValueError("split='global_temporal' needs times, and this log has none (DataConfig)")
    if not val_time < test_time:
        raise ValueError(f"val_time={val_time} must be before test_time={test_time} (DataConfig)")
    users = np.repeat(np.arange(histories.num_users), np.diff(histories.offsets))

    def end_before(cut):
        early = np.bincount(users[np.asarray(histories.times) < cut], minlength=histories.num_users)
        return histories.offsets[:-1] + early

    train_end, val_end = end_before(val_time), end_before(test_time)
    notes = {
        "train events": int((train_end - histories.offsets[:-1]).sum()),
        "val events": int((val_end - train_end).sum()),
        "test events": int((histories.offsets[1:] - val_end).sum()),
    }
    if min(notes.values()) == 0:
        low, high = int(histories.times.min()), int(histories.times.max())
        raise ValueError(
            f"val_time={val_time}, test_time={test_time} leave a part empty ({notes}); "
            f"the log spans {low} to {high} (DataConfig)"
        )
    return _make_split("global_temporal", histories, train_end, val_end, notes)


@dataclass(frozen=True)
class Examples:
    """Example e: predict targets[e] = items[ends[e]] from items[offsets[users[e]]:ends[e]]."""

    users: np.ndarray
    ends: np.ndarray
    targets: np.ndarray


def examples(histories: Histories, split: Split, part: str) -> Examples:
    """The held-out events of "val" or "test" that have at least one event before them."""
    bounds = {"val": (split.train_end, split.val_end), "test": (split.val_end, histories.offsets[1:])}
    if part not in bounds:
        raise ValueError(f"part={part!r} must be 'val' or 'test'")
    starts, stops = bounds[part]
    starts = np.maximum(starts, histories.offsets[:-1] + 1)
    lengths = np.maximum(stops - starts, 0)
    users = np.repeat(np.arange(histories.num_users), lengths)
    last = np.cumsum(lengths)
    total = int(last[-1]) if len(last) else 0
    ends = np.repeat(starts - (last - lengths), lengths) + np.arange(total)
    return Examples(users.astype(np.int32), ends.astype(np.int64), np.asarray(histories.items)[ends])
