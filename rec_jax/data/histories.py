"""Histories: the events of every user in time order, as memory-mapped CSR arrays, and their splits."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

_SPLIT_FILES = ("train_end.npy", "val_end.npy")


@dataclass(frozen=True)
class Histories:
    """The events of user u are items[offsets[u]:offsets[u + 1]], oldest first.

    items: int32[N] in 1..V, an array or a memory map. times: int64[N] seconds UTC, or None.
    offsets: int64[U + 1]. user_ids: str[U] and item_ids: str[V + 1] are the ids of the log;
    item_ids[0] == "" is padding. titles: item id -> title, where known. features: other columns of the
    events, [N] each: numbers as float64, NaN = missing; texts as int32 indices into feature_values, 0 =
    missing. notes: counts from sorting.
    """

    items: np.ndarray
    times: np.ndarray | None
    offsets: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    titles: dict[str, str] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    feature_values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.item_ids) - 1

    @property
    def num_events(self) -> int:
        return len(self.items)

    @cached_property
    def vocabulary(self) -> str:
        """sha256 of the item ids in order: with equal vocabularies, two models number the items alike."""
        return hashlib.sha256("\0".join(map(str, self.item_ids)).encode()).hexdigest()

    @cached_property
    def column_digests(self) -> dict[str, str]:
        """sha256 of each column and its feature_values, except the items, which a split's checksum covers."""
        digests = {}
        for name, column in self.columns.items():
            digest = hashlib.sha256("\0".join(self.feature_values.get(name, ())).encode())
            digest.update(np.ascontiguousarray(column))
            digests[name] = digest.hexdigest()
        return {name: digest for name, digest in digests.items() if name != "item"}

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """All columns of the events by name: "item", "time" if the log has times, and the features."""
        times = {} if self.times is None else {"time": self.times}
        return {"item": self.items} | times | self.features

    def save(self, directory: Path) -> None:
        """Writes all arrays, or none if anything fails; `load` maps them into memory."""
        with replaced_directory(Path(directory), "vocabulary.json") as new:
            arrays = {"items": np.asarray(self.items, np.int32), "offsets": self.offsets}
            arrays |= {} if self.times is None else {"times": self.times}
            arrays |= {f"feature_{i}": column for i, column in enumerate(self.features.values())}
            for name, array in arrays.items():
                np.save(new / f"{name}.npy", array)
            about = {
                "user_ids": [str(x) for x in self.user_ids],
                "item_ids": [str(x) for x in self.item_ids],
                "titles": self.titles,
                "features": list(self.features),
                "feature_values": self.feature_values,
                "notes": self.notes,
            }
            (new / "vocabulary.json").write_text(json.dumps(about))

    @classmethod
    def load(cls, directory: Path) -> "Histories":
        directory = Path(directory)
        about = json.loads((directory / "vocabulary.json").read_text())

        def mapped(name: str) -> np.ndarray:
            return np.load(directory / f"{name}.npy", mmap_mode="r")

        return cls(
            items=mapped("items"),
            times=mapped("times") if (directory / "times.npy").exists() else None,
            offsets=np.load(directory / "offsets.npy"),
            user_ids=np.array(about["user_ids"], object),
            item_ids=np.array(about["item_ids"], object),
            titles=about["titles"],
            features={name: mapped(f"feature_{i}") for i, name in enumerate(about["features"])},
            feature_values={name: tuple(values) for name, values in about["feature_values"].items()},
            notes=about["notes"],
        )


@contextlib.contextmanager
def replaced_directory(directory: Path, mark: str) -> Iterator[Path]:
    """Yields a new, empty directory to fill, and renames it to `directory` if no exception was raised.

    mark: a file that an older version of `directory` contains. Raises ValueError if `directory` contains
    other files and no `mark`.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / mark).exists():
        raise ValueError(
            f"{directory} contains other files, which would be deleted: choose an empty or a new directory"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    new.chmod(0o755)  # mkdtemp makes it private
    try:
        yield new
        old = new.with_name(new.name + ".old")
        if (
            directory.exists()
        ):  # A directory can only be renamed to an empty one, so rename the old one first.
            directory.rename(old)
        new.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def build_histories(log, titles: dict[str, str] | None = None) -> Histories:
    """Sorts a log by (user, time); events of equal time keep their order in the log.

    titles: item id -> title; None = the titles of the log.
    """
    by_user = np.argsort(log.users, kind="stable")
    order, times, notes = by_user, None, {}
    if log.times is not None:
        order = np.lexsort((log.times, log.users))
        times = log.times[order]
        same_user = np.diff(log.users[order]) == 0
        earlier, tied = np.diff(log.times[by_user]) < 0, np.diff(times) == 0
        notes = {
            "events earlier than the user's previous event in the file: sorted": int(
                (same_user & earlier).sum()
            ),
            "events at the same time as the user's previous event: in file order": int(
                (same_user & tied).sum()
            ),
        }
    counts = np.bincount(log.users, minlength=len(log.user_ids))
    titles = log.titles if titles is None else titles
    return Histories(
        items=log.items[order].astype(np.int32),
        times=times,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        user_ids=log.user_ids,
        item_ids=log.item_ids,
        titles={x: titles[x] for x in log.item_ids.tolist() if x in titles},
        notes=notes,
        **_features(log, order),
    )


def _features(log, order) -> dict[str, dict]:
    """Returns `features` and `feature_values` of Histories: columns in the given order of events, texts as
    codes in alphabetical order."""
    features, feature_values = {}, {}
    for name, column in log.features.items():
        features[name] = column[order]
        if column.dtype == object:
            values, codes = np.unique(column[order].astype(str), return_inverse=True)
            is_first_missing = len(values) > 0 and values[0] == ""
            feature_values[name] = ("", *values[is_first_missing:].tolist())
            features[name] = (codes + (not is_first_missing)).astype(np.int32)
    return {"features": features, "feature_values": feature_values}


@dataclass(frozen=True)
class Split:
    """The ends of each user's training and validation parts, as indices into `Histories.items`.

    Training events are items[offsets[u]:train_end[u]], validation targets items[train_end[u]:val_end[u]],
    test targets items[val_end[u]:offsets[u + 1]]. checksum: sha256 of items, offsets and ends; equal
    checksums mean equal splits of equal data.
    """

    kind: str
    train_end: np.ndarray
    val_end: np.ndarray
    checksum: str
    notes: dict[str, int]

    def in_train(self, histories) -> np.ndarray:
        """bool[N]: whether the event is in the training part."""
        return np.arange(histories.num_events) < np.repeat(self.train_end, np.diff(histories.offsets))

    def train_item_counts(self, histories) -> np.ndarray:
        """int64[V + 1]: the number of training events of each item."""
        train_items = np.asarray(histories.items)[self.in_train(histories)]
        return np.bincount(train_items, minlength=histories.num_items + 1)

    def save(self, directory: Path) -> None:
        with replaced_directory(Path(directory), "split.json") as new:
            for name, bounds in zip(_SPLIT_FILES, (self.train_end, self.val_end), strict=True):
                np.save(new / name, bounds)
            about = {"kind": self.kind, "checksum": self.checksum, "notes": self.notes}
            (new / "split.json").write_text(json.dumps(about, indent=1))

    @classmethod
    def load(cls, directory: Path, histories: Histories) -> "Split":
        """Raises ValueError if the files do not match the checksum."""
        directory = Path(directory)
        about = json.loads((directory / "split.json").read_text())
        train_end, val_end = (np.load(directory / name) for name in _SPLIT_FILES)
        if _checksum(histories, train_end, val_end) != about["checksum"]:
            raise ValueError(
                f"{directory}: events and split do not match the checksum in split.json: the split belongs "
                "to other data, or a file is damaged"
            )
        return cls(about["kind"], train_end, val_end, about["checksum"], about["notes"])


def _checksum(histories, train_end, val_end) -> str:
    digest = hashlib.sha256()
    digest.update(np.ascontiguousarray(histories.items, "<i4"))
    for array in (histories.offsets, train_end, val_end):
        digest.update(np.ascontiguousarray(array, "<i8"))
    return digest.hexdigest()


def _make_split(kind, histories, train_end, val_end, notes) -> Split:
    notes = {
        **notes,
        "training events": int((train_end - histories.offsets[:-1]).sum()),
        "validation targets": int((val_end - train_end).sum()),
        "test targets": int((histories.offsets[1:] - val_end).sum()),
    }
    split = Split(kind, train_end, val_end, _checksum(histories, train_end, val_end), notes)
    for part, name in (("val", "validation"), ("test", "test")):
        ex = examples(histories, split, part)
        notes[f"{name} targets without an earlier event, left out"] = ex.num_without_history
        notes[f"{name} targets that no user has in training, kept"] = ex.num_unseen
    return split


def leave_one_out(histories: Histories) -> Split:
    """Holds out the last event of each user for test, and the one before it for validation.

    Users with fewer than three events are used for training only; the notes count them. Source: Kang &
    McAuley, ICDM'18, section IV.A. Raises ValueError if no user has three events.
    """
    ends = histories.offsets[1:]
    enough = np.diff(histories.offsets) >= 3
    if not enough.any():
        raise ValueError(
            "split='leave_one_out' needs a user with three or more events, but no user has that many"
        )
    notes = {"users with fewer than 3 events, training only": int((~enough).sum())}
    return _make_split("leave_one_out", histories, ends - 2 * enough, ends - enough, notes)


def global_temporal(histories: Histories, val_time: int, test_time: int) -> Split:
    """Splits at two times, the same for all users: training ends before `val_time`, validation before
    `test_time` (seconds UTC).

    Across all users, every training event is earlier than every held-out event. An event exactly at a cut
    belongs to the later part. Raises ValueError if the log has no times or a part is empty.
    """
    if histories.times is None:
        raise ValueError("split='global_temporal' needs times, but this log has none: set time to its column")
    if not val_time < test_time:
        raise ValueError(f"val_time={val_time} must be before test_time={test_time}")
    users = np.repeat(np.arange(histories.num_users), np.diff(histories.offsets))

    def end_before(cut):
        early = np.bincount(users[np.asarray(histories.times) < cut], minlength=histories.num_users)
        return histories.offsets[:-1] + early

    notes = {"first validation time": int(val_time), "first test time": int(test_time)}
    split = _make_split("global_temporal", histories, end_before(val_time), end_before(test_time), notes)
    for part in ("training events", "validation targets", "test targets"):
        if not split.notes[part]:
            low, high = int(histories.times.min()), int(histories.times.max())
            raise ValueError(
                f"val_time={val_time}, test_time={test_time} leave no {part}: choose them between the first "
                f"and the last time, {low} and {high}"
            )
    return split


def temporal_cuts(times: np.ndarray, val_fraction: float, test_fraction: float) -> tuple[int, int]:
    """Returns (val_time, test_time) such that the latest test_fraction of all events is test, and the
    val_fraction before it is validation.

    Events exactly at a cut belong to the later part, so ties can make it larger than its fraction.
    """
    ordered = np.sort(times)
    first_test = int(len(ordered) * (1 - test_fraction))
    first_val = int(len(ordered) * (1 - test_fraction - val_fraction))
    return int(ordered[first_val]), int(ordered[min(first_test, len(ordered) - 1)])


@dataclass(frozen=True)
class Examples:
    """Example e: predict targets[e] = items[ends[e]] from items[offsets[users[e]]:ends[e]].

    users: int32[E]. ends: int64[E]. targets: int32[E]. num_without_history: the number of held-out events
    without an earlier event of their user, which are no examples. num_unseen: the number of targets without
    a training event.
    """

    users: np.ndarray
    ends: np.ndarray
    targets: np.ndarray
    num_without_history: int = 0
    num_unseen: int = 0


def examples(histories: Histories, split: Split, part: str) -> Examples:
    """Returns the held-out events of `part` ("val" or "test") that have an earlier event of their user."""
    bounds = {"val": (split.train_end, split.val_end), "test": (split.val_end, histories.offsets[1:])}
    if part not in bounds:
        raise ValueError(f"part={part!r} must be 'val' or 'test'")
    starts, stops = bounds[part]
    num_targets = int((stops - starts).sum())
    starts = np.maximum(starts, histories.offsets[:-1] + 1)
    lengths = np.maximum(stops - starts, 0)
    users = np.repeat(np.arange(histories.num_users), lengths)
    ends = ranges(starts, lengths)
    targets = np.asarray(histories.items)[ends]
    unseen = split.train_item_counts(histories)[targets] == 0
    return Examples(
        users.astype(np.int32), ends.astype(np.int64), targets, num_targets - len(ends), int(unseen.sum())
    )


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenates the ranges start:start + length."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
