"""Histories: every user's events in time order, as memory-mapped CSR files, and their splits."""

import contextlib
import functools
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
    events, [N] each: numbers as float64 with NaN where missing, texts as int32 codes of feature_values, 0
    where missing. notes: what sorting met.
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
        """sha256 of the item ids in their order: models of equal vocabularies mean the same by a row."""
        return hashlib.sha256("\0".join(map(str, self.item_ids)).encode()).hexdigest()

    @functools.cached_property
    def column_digests(self) -> dict[str, str]:
        """sha256 of each column but the items (a split's checksum covers them) and of what its codes mean."""
        digests = {}
        for name, column in self.columns.items():
            digest = hashlib.sha256("\0".join(self.feature_values.get(name, ())).encode())
            digest.update(np.ascontiguousarray(column))
            digests[name] = digest.hexdigest()
        return {name: digest for name, digest in digests.items() if name != "item"}

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """All columns of the events by name: "item", "time" where the log has times, and the features."""
        times = {} if self.times is None else {"time": self.times}
        return {"item": self.items} | times | self.features

    def save(self, directory: Path) -> None:
        """Writes the arrays, all or nothing; `load` maps them into memory."""
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
    """A new, empty directory to fill, which takes the place of `directory` once all went well.

    mark: a file that tells an earlier version of it. Raises ValueError if `directory` holds other things.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / mark).exists():
        raise ValueError(f"{directory} holds other files and would be replaced: give an empty or a new one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    new.chmod(0o755)  # mkdtemp's is private
    try:
        yield new
        old = new.with_name(new.name + ".old")
        if directory.exists():  # Renamed away first: a directory can only be renamed onto an empty one.
            directory.rename(old)
        new.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def build_histories(log, titles: dict[str, str] | None = None) -> Histories:
    """Sorts a log by (user, time); events of equal time keep their order in the log.

    titles: item id -> title; without it, those of the log.
    """
    by_user = np.argsort(log.users, kind="stable")
    order, times, notes = by_user, None, {}
    if log.times is not None:
        order = np.lexsort((log.times, log.users))
        times = log.times[order]
        same_user = np.diff(log.users[order]) == 0
        earlier, tied = np.diff(log.times[by_user]) < 0, np.diff(times) == 0
        notes = {
            "events earlier than the one before them in the file, sorted": int((same_user & earlier).sum()),
            "events at the same time as the one before them, in the order of the file": int(
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
    """The features of the log in that order of events, texts as codes in the order of their alphabet."""
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
    """Where each user's training and validation parts end, as indices into `Histories.items`.

    Training is items[offsets[u]:train_end[u]], validation targets items[train_end[u]:val_end[u]], test
    targets items[val_end[u]:offsets[u + 1]]. checksum: sha256 over items, offsets and bounds: equal
    checksums are equal splits of equal data.
    """

    kind: str
    train_end: np.ndarray
    val_end: np.ndarray
    checksum: str
    notes: dict[str, int]

    def in_train(self, histories) -> np.ndarray:
        """bool[N]: is the event in the training part?"""
        return np.arange(histories.num_events) < np.repeat(self.train_end, np.diff(histories.offsets))

    def train_item_counts(self, histories) -> np.ndarray:
        """int64[V + 1]: training events of each item."""
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
        """Raises ValueError if the files are not what the checksum was taken of."""
        directory = Path(directory)
        about = json.loads((directory / "split.json").read_text())
        train_end, val_end = (np.load(directory / name) for name in _SPLIT_FILES)
        if _checksum(histories, train_end, val_end) != about["checksum"]:
            raise ValueError(
                f"{directory}: events and bounds do not have the checksum in split.json; the split is of "
                "other data, or a file is damaged"
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
    """The last event of each user is the test, the one before it the validation.

    Users with fewer than three events are for training only, and counted. Source: Kang & McAuley, ICDM'18,
    section IV.A. Raises ValueError if that leaves no target.
    """
    ends = histories.offsets[1:]
    enough = np.diff(histories.offsets) >= 3
    if not enough.any():
        raise ValueError("split='leave_one_out' needs users with three events or more, and there is none")
    notes = {"users with fewer than 3 events, training only": int((~enough).sum())}
    return _make_split("leave_one_out", histories, ends - 2 * enough, ends - enough, notes)


def global_temporal(histories: Histories, val_time: int, test_time: int) -> Split:
    """Training before `val_time`, validation before `test_time`, test from then on (seconds UTC).

    Every training event is earlier than any held-out one, across users. An event at a cut belongs to the
    later part. Raises ValueError without times, or if a part is empty.
    """
    if histories.times is None:
        raise ValueError("split='global_temporal' needs times, and this log has none")
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
                f"val_time={val_time}, test_time={test_time} leave no {part}: the times are {low} to {high}"
            )
    return split


def temporal_cuts(times: np.ndarray, val_fraction: float, test_fraction: float) -> tuple[int, int]:
    """(val_time, test_time) such that the last fractions of all events are validation and test.

    Events at the time of a cut go to the later part, so ties make it larger than asked for.
    """
    ordered = np.sort(times)
    test_at = int(len(ordered) * (1 - test_fraction))
    val_at = int(len(ordered) * (1 - test_fraction - val_fraction))
    return int(ordered[val_at]), int(ordered[min(test_at, len(ordered) - 1)])


@dataclass(frozen=True)
class Examples:
    """Example e: predict targets[e] = items[ends[e]] from items[offsets[users[e]]:ends[e]].

    users: int32[E]. ends: int64[E]. targets: int32[E]. num_without_history: held-out events left out,
    because their user has none before. num_unseen: targets that are in no training part.
    """

    users: np.ndarray
    ends: np.ndarray
    targets: np.ndarray
    num_without_history: int = 0
    num_unseen: int = 0


def examples(histories: Histories, split: Split, part: str) -> Examples:
    """The held-out events of "val" or "test" that have at least one event before them."""
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
    """The ranges start:start + length, one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
