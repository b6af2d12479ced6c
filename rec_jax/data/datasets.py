"""Data sets: a config becomes histories and their split, which are prepared once and kept on disk."""

import dataclasses
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rec_jax.data.cleaning import REPORT_HEAD, clean
from rec_jax.data.histories import (
    Histories,
    Split,
    build_histories,
    global_temporal,
    leave_one_out,
    replaced_directory,
    temporal_cuts,
)
from rec_jax.data.interactions import read_log
from rec_jax.data.schema import Schema, make_schema
from rec_jax.data.simulator import SimulatorConfig, World
from rec_jax.data.titles import read_titles
from rec_jax.report import format_table

_ABOUT = "prepared.json"
_VERSION = 2  # of the files on disk and of the rules that make them: raise it when either changes
# Fields of DataConfig, by the step that reads them.
_READING = ("format", "user", "item", "time", "rating", "features", "delimiter", "time_unit")
_CLEANING = ("min_rating", "duplicates", "min_item_events", "min_user_events", "k_core")
_SPLIT = ("split", "val_time", "test_time", "val_fraction", "test_fraction")
_NOT_PREPARED = ("path", "max_len", "context")  # fields that do not change what is on disk


@dataclass(frozen=True)
class DataConfig:
    """The source of the interactions, the rules that clean them, and their split.

    path: a file, a directory that prepare_data wrote, or for format "tfds" a name (movielens/1m-ratings).
    Relative paths (path, titles, titles_ids) are looked up in the current directory, then in $REC_JAX_DATA.
    The fields from user to time_unit are as in `read_log`, those from min_rating to k_core as in `clean`.
    """

    path: str = ""
    format: Literal[
        "auto", "movielens", "tfds", "sasrec", "sequences", "recbole", "csv", "parquet", "simulator"
    ] = "auto"
    user: str = ""
    item: str = ""
    time: str = ""
    rating: str = ""
    features: tuple[str, ...] = ()
    # Features that are known when a recommendation is requested. So far, rankers treat them as missing.
    context: tuple[str, ...] = ()
    delimiter: str = ""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    titles: str = ""  # a file with titles: movies.dat, a RecBole .item file, csv, tsv
    titles_ids: str = ""  # a file with `item id_in_titles` lines, if the log's items were renumbered
    min_rating: float = 0.0
    duplicates: Literal["keep", "first", "last"] = "keep"
    min_item_events: int = 1
    min_user_events: int = 1
    k_core: int = 0
    split: Literal["leave_one_out", "global_temporal"] = "leave_one_out"
    val_time: int = 0  # global_temporal: the first second (UTC) of validation and of test;
    test_time: int = 0  # 0: computed from the two fractions of events below
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    max_len: int = 200  # a model reads the last max_len events of a user
    sim: SimulatorConfig = SimulatorConfig()  # format "simulator"

    def __post_init__(self):
        if self.max_len < 1:
            raise ValueError(f"max_len={self.max_len} must be 1 or more (DataConfig)")
        if (self.val_time == 0) != (self.test_time == 0):
            raise ValueError(
                f"val_time={self.val_time}, test_time={self.test_time}: set both or neither (DataConfig)"
            )
        if self.split != "global_temporal" and self.val_time:
            raise ValueError(
                f"val_time={self.val_time} has no effect with split={self.split!r}: set "
                "split='global_temporal', or remove val_time and test_time (DataConfig)"
            )
        val, test = self.val_fraction, self.test_fraction
        if not (0 < val and 0 < test and val + test < 1):
            raise ValueError(
                f"val_fraction={val} and test_fraction={test} must be above 0, and their sum below 1 "
                "(DataConfig)"
            )
        if reserved := {"item", "time"} & set(self.features):
            raise ValueError(
                f"features={self.features}: {' and '.join(sorted(reserved))} is reserved for the item or the "
                "time of an event and cannot be a feature: remove it, or rename the column in the file "
                "(DataConfig)"
            )
        if self.titles_ids and not self.titles:
            raise ValueError(
                f"titles_ids={self.titles_ids!r} has no effect without titles: set titles (DataConfig)"
            )


@dataclass(frozen=True)
class Dataset:
    """Histories, their split and the schema of their features.

    report: text tables about reading, cleaning, histories and split. world: the simulator that drew the log,
    or None.
    """

    histories: Histories
    split: Split
    report: list[str]
    world: World | None
    schema: Schema = ()


def load_dataset(config: DataConfig, directory: Path | str, *, is_used: bool = False) -> Dataset:
    """Returns the data set of a config, and prepares it in `directory` if it is not there yet.

    A directory made from another config, or from a file that has changed since, is prepared again. Prints the
    report of a new preparation, or one line about an existing one.

    is_used: whether a run was trained on the data in `directory`, which must then not change.
    Raises ValueError for mistakes in the files or the config, and says how to correct them.
    """
    dataset, is_new = prepare_dataset(config, directory, is_used=is_used)
    if is_new:
        print("\n\n".join(dataset.report), flush=True)
    else:
        h = dataset.histories
        print(
            f"data prepared before: {h.num_users:,} users, {h.num_items:,} items, {h.num_events:,} events, "
            f"{dataset.split.kind}, checksum {dataset.split.checksum[:12]}",
            flush=True,
        )
    return dataset


def load_prepared(config: DataConfig, directory: Path | str) -> Dataset:
    """Returns the data set that a run has prepared in `directory`, or that its config names as a prepared
    directory. Never prepares a data set. Raises ValueError if it is missing or damaged.
    """
    directory = Path(directory)
    if (about := _read_about(directory)) is not None:
        return _load(directory, about, config)
    path = Path(_source(config))
    if not path.is_dir():
        raise ValueError(
            f"{directory / _ABOUT} is missing: the run was trained on the split in this directory, and "
            f"preparing {str(path)!r} again could give another split: restore the directory, or train again"
        )
    return _load(path, _about_of_directory(config, path), config)


def prepare_dataset(
    config: DataConfig, directory: Path | str, *, is_used: bool = False
) -> tuple[Dataset, bool]:
    """Returns (data set, whether it was prepared just now). As `load_dataset`, but prints nothing."""
    directory, path = Path(directory), _source(config)
    if path and Path(path).is_dir():
        return _load(Path(path), _about_of_directory(config, Path(path)), config), False
    fingerprint = _fingerprint(config, path)
    about = _read_about(directory)
    is_new = about is None or about["fingerprint"] != fingerprint
    if is_new:
        before = dataclasses.replace(config, context=())  # the old data may lack these columns
        used = (about, _load(directory, about, before)) if about and is_used else None
        about = _prepare(config, path, directory, fingerprint, used)
    return _load(directory, about, config), is_new


def resolve_path(path: str, name: str) -> Path:
    """Finds an existing path in the current directory, or else in $REC_JAX_DATA.

    Raises ValueError with the paths that were tried.
    """
    root = os.environ.get("REC_JAX_DATA")
    candidates = [Path(path)] + ([Path(root) / path] if root else [])
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    tried = " and ".join(str(candidate.absolute()) for candidate in dict.fromkeys(candidates))
    hint = "" if root else ", or set the environment variable REC_JAX_DATA to the directory of your data sets"
    tfds = "; for TFDS set format='tfds'" if path.startswith("movielens/") else ""
    raise ValueError(f"{name}={path!r} does not exist (tried {tried}): correct the path{hint}{tfds}")


def _source(config: DataConfig) -> str:
    """Returns the resolved path, the TFDS name, or "" for the simulator."""
    if config.format == "simulator":
        if config.path:
            raise ValueError(
                f"path={config.path!r} has no effect with format='simulator': set data.format=auto to "
                "read it (DataConfig)"
            )
        return ""
    if not config.path:
        raise ValueError(
            "path='' is empty: name the file of a log with --config.data.path=FILE (prepare_data: "
            "--input=FILE), or set format='simulator' (DataConfig)"
        )
    return config.path if config.format == "tfds" else str(resolve_path(config.path, "path"))


def _fingerprint(config: DataConfig, path: str) -> dict[str, Any]:
    """Returns the config and source files that the prepared files depend on."""
    files = [Path(path)] if path and config.format != "tfds" else []
    files += [resolve_path(getattr(config, x), x) for x in ("titles", "titles_ids") if getattr(config, x)]
    left_out = _NOT_PREPARED if config.format == "simulator" else (*_NOT_PREPARED, "sim")
    fingerprint = {
        "version": _VERSION,
        "source": path,
        "config": {name: x for name, x in dataclasses.asdict(config).items() if name not in left_out},
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    return json.loads(json.dumps(fingerprint))  # as read back from disk: tuples become lists


def _read_about(directory: Path) -> dict[str, Any] | None:
    file = directory / _ABOUT
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except ValueError as error:
        raise _damaged(directory, error) from error


def _damaged(directory: Path, error: Exception) -> ValueError:
    return ValueError(f"{directory} is damaged ({error}): delete it, and the data will be prepared again")


def _about_of_directory(config: DataConfig, path: Path) -> dict[str, Any]:
    """Reads the description of a prepared directory. Raises ValueError if the config asks for other cleaning
    rules or another split."""
    about = _read_about(path)
    if about is None:
        raise ValueError(
            f"path={str(path)!r} is a directory without {_ABOUT}, so experiments.prepare_data did not "
            "write it: set path to a file, or to a prepared directory (DataConfig)"
        )
    made_with, default = about["fingerprint"]["config"], DataConfig()
    for name in _CLEANING + _SPLIT:
        value = getattr(config, name)
        if value != made_with[name] and (name == "split" or value != getattr(default, name)):
            raise ValueError(
                f"{name}={value!r}, but {path} was prepared with {name}={made_with[name]!r}: set "
                f"{name}={made_with[name]!r}, or prepare the data again (DataConfig)"
            )
    return about


def _load(directory: Path, about: dict[str, Any], config: DataConfig) -> Dataset:
    if about["fingerprint"]["version"] != _VERSION:
        raise ValueError(f"{directory} was prepared by another version of rec_jax: prepare the data again")
    try:
        histories = Histories.load(directory / "histories")
        split = Split.load(directory / "split", histories)
    except (OSError, KeyError, ValueError) as error:
        raise _damaged(directory, error) from error
    world = World(config.sim) if config.format == "simulator" else None
    return Dataset(histories, split, about["report"], world, make_schema(histories, split, config.context))


def _prepare(config: DataConfig, path: str, directory: Path, fingerprint, used=None) -> dict[str, Any]:
    if config.format == "simulator":
        log = World(config.sim).sample()
    else:
        log = read_log(path, **{name: getattr(config, name) for name in _READING})
    log, cleaning = clean(log, **{name: getattr(config, name) for name in _CLEANING})
    titles = None
    if config.titles:
        ids = resolve_path(config.titles_ids, "titles_ids") if config.titles_ids else None
        titles = read_titles(resolve_path(config.titles, "titles"), ids, item=config.item)
    histories = build_histories(log, titles)
    split = _split(config, histories)
    if used:
        _check_unchanged(*used, fingerprint, histories, split, directory)
    about = {"fingerprint": fingerprint, "report": _report(config, log, cleaning, histories, split)}
    try:
        with replaced_directory(directory, _ABOUT) as new:
            histories.save(new / "histories")
            split.save(new / "split")
            (new / _ABOUT).write_text(json.dumps(about, indent=1))
    except OSError:  # Another process of the same run may have written the directory first.
        if (present := _read_about(directory)) is None or present["fingerprint"] != fingerprint:
            raise
    return about


def _check_unchanged(about, dataset: Dataset, fingerprint, histories, split, directory: Path) -> None:
    """Raises ValueError with a list of the changes if a run would resume with data other than it had."""

    def summary(histories, split, made_from) -> dict[str, Any]:
        return {
            **{f"data.{name}": value for name, value in made_from["config"].items()},
            "users": histories.num_users,
            "items": histories.num_items,
            "events": histories.num_events,
            "item vocabulary": histories.vocabulary[:12],
            "split checksum": split.checksum[:12],
            **{f"column {name}": digest[:12] for name, digest in histories.column_digests.items()},
        }

    old = summary(dataset.histories, dataset.split, about["fingerprint"])
    new = summary(histories, split, fingerprint)
    changed = [f"{x} (was {old.get(x, 'missing')}, is now {new[x]})" for x in new if old.get(x) != new[x]]
    before = dataset.histories
    is_same = (
        dataset.split.checksum == split.checksum
        and before.vocabulary == histories.vocabulary
        and before.column_digests == histories.column_digests
    )
    if not is_same:
        raise ValueError(
            f"the data differ from those that the run in {directory.parent} was trained on (kept in "
            f"{directory}): {', '.join(changed)}. To resume, restore the log and these settings; to use the "
            "new data, train in another workdir"
        )


def _split(config: DataConfig, histories: Histories) -> Split:
    if config.split == "leave_one_out":
        return leave_one_out(histories)
    val_time, test_time = config.val_time, config.test_time
    if not val_time and histories.times is not None:
        val_time, test_time = temporal_cuts(histories.times, config.val_fraction, config.test_fraction)
    return global_temporal(histories, val_time, test_time)


def _report(config, log, cleaning: list[tuple], histories: Histories, split: Split) -> list[str]:
    source = log.notes or (f"simulated: {config.sim}",)
    lengths = np.diff(histories.offsets)
    about = {
        "users": histories.num_users,
        "items": histories.num_items,
        "events": histories.num_events,
        "fewest events of a user": int(lengths.min()),
        "most events of a user": int(lengths.max()),
        **histories.notes,
        "items with a title": len(histories.titles),
    }
    rows = [
        (name, f"{datetime.fromtimestamp(x, UTC):%Y-%m-%d %H:%M:%S} UTC" if name.endswith(" time") else x)
        for name, x in split.notes.items()
    ]
    return [
        "\n".join(("Reading", *source)),
        "Cleaning\n" + format_table(REPORT_HEAD, cleaning),
        "Histories\n" + format_table(("quantity", "value"), about.items()),
        f"Split: {split.kind}\n{format_table(('quantity', 'value'), rows)}\nchecksum {split.checksum}",
    ]
