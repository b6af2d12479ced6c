"""From a config to histories and their split, read once and kept on disk."""

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
_VERSION = 2  # of the files on disk and of the rules behind them; raise it when either changes
# Fields of DataConfig by what reads them.
_READING = ("format", "user", "item", "time", "rating", "features", "delimiter", "time_unit")
_CLEANING = ("min_rating", "duplicates", "min_item_events", "min_user_events", "k_core")
_SPLIT = ("split", "val_time", "test_time", "val_fraction", "test_fraction")
_NOT_PREPARED = ("path", "max_len", "context")  # fields that do not change what is on disk


@dataclass(frozen=True)
class DataConfig:
    """Where interactions come from, how they are cleaned and how they are split.

    path: a file, a directory that prepare_data wrote, or for format "tfds" a name (movielens/1m-ratings).
    A relative one is looked up in the current directory, then in $REC_JAX_DATA; titles and titles_ids too.
    The fields up to time_unit are as in `read_log`, those up to k_core as in `clean`.
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
    # Features that are known when a recommendation is requested; there they count as missing so far.
    context: tuple[str, ...] = ()
    delimiter: str = ""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    titles: str = ""  # a file of titles: movies.dat, a RecBole .item file, csv, tsv
    titles_ids: str = ""  # a file of `item id_in_titles` lines, where the log's items were renumbered
    min_rating: float = 0.0
    duplicates: Literal["keep", "first", "last"] = "keep"
    min_item_events: int = 1
    min_user_events: int = 1
    k_core: int = 0
    split: Literal["leave_one_out", "global_temporal"] = "leave_one_out"
    val_time: int = 0  # global_temporal: the first second of validation and of test;
    test_time: int = 0  # 0 takes them from the fractions of events below
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    max_len: int = 200  # events of a user that a model sees
    sim: SimulatorConfig = SimulatorConfig()  # format "simulator"

    def __post_init__(self):
        if self.max_len < 1:
            raise ValueError(f"max_len={self.max_len} must be 1 or more (DataConfig)")
        if (self.val_time == 0) != (self.test_time == 0):
            raise ValueError(
                f"val_time={self.val_time}, test_time={self.test_time}: set both, or none (DataConfig)"
            )
        if self.split != "global_temporal" and self.val_time:
            raise ValueError(f"val_time={self.val_time} has no use with split={self.split!r} (DataConfig)")
        val, test = self.val_fraction, self.test_fraction
        if not (0 < val and 0 < test and val + test < 1):
            raise ValueError(
                f"val_fraction={val} and test_fraction={test} must be above 0 and together below 1 "
                "(DataConfig)"
            )
        if reserved := {"item", "time"} & set(self.features):
            raise ValueError(
                f"features={self.features}: {' and '.join(sorted(reserved))} name the item and the time of "
                "an event themselves: leave them out, or rename the columns in the file (DataConfig)"
            )
        if self.titles_ids and not self.titles:
            raise ValueError(f"titles_ids={self.titles_ids!r} needs titles (DataConfig)")


@dataclass(frozen=True)
class Dataset:
    """Histories, their split and the schema of their features.

    report: text tables of what was read, removed and held out. world: the simulator that drew the log, or
    None."""

    histories: Histories
    split: Split
    report: list[str]
    world: World | None
    schema: Schema = ()


def load_dataset(config: DataConfig, directory: Path | str, *, is_used: bool = False) -> Dataset:
    """The data set of a config, prepared in `directory` unless it is there already.

    A directory made from another config, or from a file that has changed since, is prepared anew. Prints
    the report of what is new, and a line of what was there.

    is_used: a run has been trained on what is in `directory`, which must then stay what it is.
    Raises ValueError for whatever is wrong with the files or the config, with the way out.
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
    """The data set that a run has prepared in `directory`, or the prepared directory that its config names:
    never anything that would have to be prepared anew. Raises ValueError if it is missing or damaged.
    """
    directory = Path(directory)
    if (about := _read_about(directory)) is not None:
        return _load(directory, about, config)
    path = Path(_source(config))
    if not path.is_dir():
        raise ValueError(
            f"{directory / _ABOUT} is missing: the split that the run was trained on was prepared there, and "
            f"another preparation of {str(path)!r} could be another split: bring it back, or train again"
        )
    return _load(path, _about_of_directory(config, path), config)


def prepare_dataset(
    config: DataConfig, directory: Path | str, *, is_used: bool = False
) -> tuple[Dataset, bool]:
    """As `load_dataset`, but prints nothing, and tells whether the data set was prepared just now."""
    directory, path = Path(directory), _source(config)
    if path and Path(path).is_dir():
        return _load(Path(path), _about_of_directory(config, Path(path)), config), False
    fingerprint = _fingerprint(config, path)
    about = _read_about(directory)
    is_new = about is None or about["fingerprint"] != fingerprint
    if is_new:
        before = dataclasses.replace(config, context=())  # whose columns may be new
        used = (about, _load(directory, about, before)) if about and is_used else None
        about = _prepare(config, path, directory, fingerprint, used)
    return _load(directory, about, config), is_new


def resolve_path(path: str, name: str) -> Path:
    """An existing path: in the current directory, or else in $REC_JAX_DATA.

    Raises ValueError saying where it was looked for.
    """
    root = os.environ.get("REC_JAX_DATA")
    places = [Path(path)] + ([Path(root) / path] if root else [])
    for place in places:
        if place.exists():
            return place.resolve()
    looked = " and ".join(str(place.absolute()) for place in dict.fromkeys(places))
    hint = "" if root else ", or put the directory of your data sets into the variable REC_JAX_DATA"
    tfds = "; for TFDS set format='tfds'" if path.startswith("movielens/") else ""
    raise ValueError(f"{name}={path!r} does not exist (looked for {looked}): give the right path{hint}{tfds}")


def _source(config: DataConfig) -> str:
    """The resolved path, the TFDS name, or "" for the simulator."""
    if config.format == "simulator":
        if config.path:
            raise ValueError(
                f"path={config.path!r} has no use with format='simulator': set data.format=auto to read it "
                "(DataConfig)"
            )
        return ""
    if not config.path:
        raise ValueError("path is empty: give a file, or set format='simulator' (DataConfig)")
    return config.path if config.format == "tfds" else str(resolve_path(config.path, "path"))


def _fingerprint(config: DataConfig, path: str) -> dict[str, Any]:
    """What the files on disk were made from."""
    files = [Path(path)] if path and config.format != "tfds" else []
    files += [resolve_path(getattr(config, x), x) for x in ("titles", "titles_ids") if getattr(config, x)]
    left_out = _NOT_PREPARED if config.format == "simulator" else (*_NOT_PREPARED, "sim")
    fingerprint = {
        "version": _VERSION,
        "source": path,
        "config": {name: x for name, x in dataclasses.asdict(config).items() if name not in left_out},
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    return json.loads(json.dumps(fingerprint))  # as it will be read back: tuples are lists


def _read_about(directory: Path) -> dict[str, Any] | None:
    file = directory / _ABOUT
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except ValueError as error:
        raise _damaged(directory, error) from error


def _damaged(directory: Path, error: Exception) -> ValueError:
    return ValueError(f"{directory} is damaged: delete it, so that the data are prepared again ({error})")


def _about_of_directory(config: DataConfig, path: Path) -> dict[str, Any]:
    """What a prepared directory says of itself. A config with other cleaning or another split is an error."""
    about = _read_about(path)
    if about is None:
        raise ValueError(
            f"path={str(path)!r} is a directory, but not one that experiments.prepare_data wrote "
            f"({_ABOUT} is missing): give a file"
        )
    made_with, default = about["fingerprint"]["config"], DataConfig()
    for name in _CLEANING + _SPLIT:
        asked = getattr(config, name)
        if asked != made_with[name] and (name == "split" or asked != getattr(default, name)):
            raise ValueError(
                f"{name}={asked!r}, but {path} was prepared with {name}={made_with[name]!r}: set it to that, "
                "or prepare the data again (DataConfig)"
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
        titles = read_titles(resolve_path(config.titles, "titles"), ids)
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
    except OSError:  # Another process of the same run may have put its copy there first.
        if (there := _read_about(directory)) is None or there["fingerprint"] != fingerprint:
            raise
    return about


def _check_unchanged(about, dataset: Dataset, fingerprint, histories, split, directory: Path) -> None:
    """Raises ValueError, naming what has changed, where a run would go on with other data than it had."""

    def facts(histories, split, made_from) -> dict[str, Any]:
        return {
            **{f"data.{name}": value for name, value in made_from["config"].items()},
            "users": histories.num_users,
            "items": histories.num_items,
            "events": histories.num_events,
            "item vocabulary": histories.vocabulary[:12],
            "split checksum": split.checksum[:12],
            **{f"column {name}": digest[:12] for name, digest in histories.column_digests.items()},
        }

    then = facts(dataset.histories, dataset.split, about["fingerprint"])
    now = facts(histories, split, fingerprint)
    changed = [f"{x} ({then.get(x, 'nothing')} then, {now[x]} now)" for x in now if then.get(x) != now[x]]
    before = dataset.histories
    same = [(before.vocabulary, histories.vocabulary), (before.column_digests, histories.column_digests)]
    if any(old != new for old, new in [(dataset.split.checksum, split.checksum), *same]):
        raise ValueError(
            f"the data are not those that the run in {directory.parent} was trained on, which stay in "
            f"{directory}: {', '.join(changed)}. Bring back the log and the settings of then to resume, or "
            "train in another workdir"
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
        "Histories\n" + format_table(("what", "count"), about.items()),
        f"Split: {split.kind}\n{format_table(('what', 'count'), rows)}\nchecksum {split.checksum}",
    ]
