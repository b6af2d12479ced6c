"""Readers, one per file format: they return the columns of a file, with the values unchanged."""

import difflib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
from tqdm import tqdm

from rec_jax.data.textfile import TextFile, count, head_lines, is_utf8, numbered_lines, open_bytes, where

# The usual column names, in lower case and without "_"; used if the config names no column.
_USUAL_NAMES = {
    "user": ("userid", "user", "uid"),
    "item": ("itemid", "item", "movieid"),
    "time": ("timestamp", "time"),
    "rating": ("rating",),
}


@dataclass(frozen=True)
class ColumnNames:
    """Names of the columns to read; "" = a column with a usual name, if there is one."""

    user: str = ""
    item: str = ""
    time: str = ""
    rating: str = ""
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """The columns of a file as Arrow arrays: text from text files, typed from Parquet."""

    users: pa.ChunkedArray
    items: pa.ChunkedArray
    where: Callable[[int], str]  # row -> its file, line and text, for messages
    times: pa.ChunkedArray | None = None
    ratings: pa.ChunkedArray | None = None
    features: dict[str, pa.ChunkedArray] = field(default_factory=dict)
    whole_ids: bool = False  # the format allows only whole numbers as ids
    titles: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_sasrec(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """`user item` lines, each user's in time order. Source: Kang & McAuley, ICDM'18, data format."""
    _refuse_names(names, "sasrec", "user and item")
    return _read_named(TextFile(path, delimiter or " ", ["user", "item"]), ColumnNames(), whole_ids=True)


def read_sequences(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """`user item item ...` lines, one per user, oldest item first; separated by blanks by default."""
    _refuse_names(names, "sequences", "user and items")
    open_bytes(path)  # raises if the file is empty or not text
    items, lengths, line_of_user, num_blank = [], [], {}, 0
    for number, line in numbered_lines(path):
        if not line.strip():
            num_blank += 1
            continue
        user, *user_items = line.split(delimiter or None)
        if not user_items or not is_utf8(line):
            separator = repr(delimiter) if delimiter else "blanks (or set delimiter)"
            raise ValueError(
                f"{where(path, number, line)}: expected `user item item ...` as UTF-8 text, separated by "
                f"{separator}"
            )
        if user in line_of_user:
            raise ValueError(
                f"{where(path, number, line)}: user {user} already has line {line_of_user[user]}, but the "
                "sequences format has one line per user: for `user item` lines set format='sasrec'"
            )
        line_of_user[user] = number
        items += user_items
        lengths.append(len(user_items))
    user_of_event = np.repeat(np.arange(len(lengths)), lengths)

    def where_event(event: int) -> str:
        number = [*line_of_user.values()][user_of_event[event]]
        _, line = next(itertools.islice(numbered_lines(path), number - 1, None))
        return f"{where(path, number, line)} (item {items[event]})"

    return Columns(
        pa.chunked_array([pa.array([*line_of_user], pa.string()).take(pa.array(user_of_event))]),
        pa.chunked_array([pa.array(items, pa.string())]),
        where_event,
        whole_ids=True,
        notes=_blank_note(num_blank),
    )


def read_movielens(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """MovieLens files: `user::item::rating::time` lines (ratings.dat), tabs (u.data), or ratings.csv."""
    if path.suffix == ".csv":
        return _read_named(TextFile(path, delimiter or ",", quotes=True), names, whole_ids=True)
    _refuse_names(names, "movielens", "user, item, rating and time")
    usual = "\t" if "\t" in head_lines(path, 1)[0] else "::"
    file = TextFile(path, delimiter or usual, ["user", "item", "rating", "time"])
    return _read_named(file, ColumnNames(), whole_ids=True)


def read_csv(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """A header line, then one line per event; separated by commas (tabs in a .tsv file) by default."""
    usual = "\t" if path.suffix == ".tsv" else ","
    return _read_named(TextFile(path, delimiter or usual, quotes=True), names)


def read_recbole(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """A RecBole atomic file: the header has the type of each column (`user_id:token`); tabs by default."""
    file = TextFile(path, delimiter or "\t")
    untyped = [name for name in file.names if ":" not in name]
    if untyped:
        raise ValueError(
            f"{path}: column {untyped[0]!r} of the header has no type, expected a name like user_id:token: "
            "for a header without types set format='csv' and delimiter"
        )
    file.names = [name.rpartition(":")[0] for name in file.names]
    return _read_named(file, names)


def read_parquet(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """A Parquet file with named columns."""
    if delimiter:
        raise ValueError(f"delimiter={delimiter!r} has no effect on a Parquet file ({path}): remove it")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: expected at least one event")
    try:
        available = papq.read_schema(path).names
        picked = _pick_all(names, available, path)
        table = papq.read_table(path, columns=[*dict.fromkeys(picked.values())])
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    if not table.num_rows:
        raise ValueError(f"{path} contains no events: expected at least one row")
    return _columns(table, picked, lambda row: f"{path}, row {row + 1}")


def read_tfds(name: str) -> Columns:
    """MovieLens from TensorFlow Datasets, such as `movielens/1m-ratings`.

    Only the first use needs a network and, for the 100k and 1m sets, TensorFlow. TFDS shuffles the rows, so
    they are not in time order.
    """
    if not re.fullmatch(r"movielens/[\w-]+-ratings(:[\d.]+)?", name):
        raise ValueError(
            f"path={name!r} is not a MovieLens ratings data set of TFDS: set it to a name like "
            "movielens/1m-ratings"
        )
    import tensorflow_datasets as tfds
    import tensorflow_datasets.structured.movielens  # noqa: F401  registers the data sets

    instead = "or download MovieLens from grouplens.org and read its ratings file with format='movielens'"
    try:
        source = tfds.data_source(name, split="train")
    except ImportError as error:
        raise ValueError(
            f"path={name!r}: TFDS needs TensorFlow to prepare this data set (once; reading it does not): pip "
            f"install 'rec_jax[tensorflow]', {instead} ({error})"
        ) from error
    except Exception as error:  # TFDS and its downloader raise many unrelated types
        raise ValueError(
            f"path={name!r}: TFDS cannot load it ({type(error).__name__}: {error}). The first use needs a "
            f"network: try again with one, {instead}"
        ) from error
    fields = ("user_id", "movie_id", "timestamp", "user_rating", "movie_title")
    # About 0.3 ms per element, mostly in TFDS: minutes for a million events, once per prepared data set.
    rows = [[element[key] for key in fields] for element in tqdm(source, f"reading {name}", disable=None)]
    users, items, times, ratings, titles = zip(*rows, strict=True)
    users, items, titles = ([value.decode() for value in column] for column in (users, items, titles))
    user_column, item_column, *others = (pa.chunked_array([x]) for x in (users, items, times, ratings))
    return Columns(
        user_column,
        item_column,
        lambda row: f"{name}, element {row}",
        *others,
        whole_ids=True,
        titles=dict(zip(items, titles, strict=True)),
    )


def pick_column(kind: str, given: str, available: Sequence[str], path: Path) -> str | None:
    """Returns the name of the column for `kind`: the given one, or the only one with a usual name, or None.

    Raises ValueError with a list of the columns if the given one does not exist, or two have a usual name.
    """
    if given:
        if given in available:
            return given
        near = difflib.get_close_matches(given, available, n=1)
        near = near or [name for name in available if name.lower() == given.lower()]
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        todo = f"set {kind} to one of its columns, {', '.join(available)}{hint}"
        if all(re.fullmatch(r"[\d.]*", name) for name in available):
            todo = "its first line looks like an event: add a header line with the column names before it"
        raise ValueError(f"{path} has no column {given!r}: {todo}")
    usual = [name for name in available if name.lower().replace("_", "") in _USUAL_NAMES[kind]]
    if len(usual) > 1:
        raise ValueError(
            f"{path}: the {kind} column could be {' or '.join(usual)}: set {kind} to one of them"
        )
    return usual[0] if usual else None


def _pick_all(names: ColumnNames, available: Sequence[str], path: Path) -> dict[str, str]:
    picked = {kind: pick_column(kind, getattr(names, kind), available, path) for kind in _USUAL_NAMES}
    for kind in ("user", "item"):
        if picked[kind] is None:
            raise ValueError(
                f"{path}: cannot find the {kind} column: set {kind} to one of the columns of the header, "
                f"{', '.join(available)} (if the first line is not a header, add one)"
            )
    for name in names.features:
        picked[f"feature {name}"] = pick_column("features", name, available, path)
    return {kind: name for kind, name in picked.items() if name}


def _read_named(file: TextFile, names: ColumnNames, whole_ids: bool = False) -> Columns:
    picked = _pick_all(names, file.names, file.path)
    table = file.columns([*dict.fromkeys(picked.values())])
    return _columns(table, picked, file.where, whole_ids, _blank_note(file.num_blank))


def _columns(table, picked: dict[str, str], where, whole_ids=False, notes=()) -> Columns:
    chosen = ", ".join(f"{kind}={name}" for kind, name in picked.items() if not kind.startswith("feature "))
    return Columns(
        table[picked["user"]],
        table[picked["item"]],
        where,
        table[picked["time"]] if "time" in picked else None,
        table[picked["rating"]] if "rating" in picked else None,
        {kind[8:]: table[name] for kind, name in picked.items() if kind.startswith("feature ")},
        whole_ids,
        notes=(f"columns: {chosen}", *notes),
    )


def _blank_note(num_blank: int) -> tuple[str, ...]:
    return (f"{count(num_blank, 'blank line')} skipped",) if num_blank else ()


def _refuse_names(names: ColumnNames, format: str, fixed: str) -> None:
    given = [kind for kind in ("user", "item", "time", "rating", "features") if getattr(names, kind)]
    if given:
        raise ValueError(
            f"{given[0]}={getattr(names, given[0])!r} has no effect: the {format} format has no header, and "
            f"its columns are {fixed}; remove it, or set another format"
        )


READERS = {
    "sasrec": read_sasrec,
    "sequences": read_sequences,
    "movielens": read_movielens,
    "recbole": read_recbole,
    "csv": read_csv,
    "parquet": read_parquet,
}


def detect_format(path: Path) -> tuple[str, str]:
    """Detects the format of a file from its name and its first lines. Returns (format, reason).

    Raises ValueError if the format cannot be detected.
    """
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".pq"):
        return "parquet", f"detected by the name (*{suffix})"
    open_bytes(path)  # raises if the file is empty or not text
    lines = head_lines(path)
    if suffix == ".inter":
        return "recbole", "detected by the name (*.inter)"
    if suffix == ".csv" and [x.strip() for x in lines[0].split(",")][:2] == ["userId", "movieId"]:
        return "movielens", "detected by the header"
    if suffix in (".csv", ".tsv"):
        return "csv", f"detected by the name (*{suffix})"
    if "::" in lines[0] or path.name == "u.data":
        evidence = "'::' in the first line" if "::" in lines[0] else "the name"
        return "movielens", f"detected by {evidence}"
    if all(re.fullmatch(r"[-+\w]+(\s+[-+\w]+)*\s*", line) for line in lines):
        fields = [line.split() for line in lines]
        num_pairs = sum(len(x) == 2 for x in fields)
        users_repeat = len({x[0] for x in fields}) < len(fields)
        reason = f"detected by the first {count(len(lines), 'line')}"
        if num_pairs == len(fields) or (users_repeat and num_pairs > len(fields) / 2):
            return "sasrec", f"{reason}, of two ids each"
        if not users_repeat and len({len(x) for x in fields}) > 1:
            return "sequences", f"{reason}, of different lengths, one per user"
    raise ValueError(
        f"{where(path, 1, lines[0])}: cannot detect the format from this line: set format to one of "
        f"{', '.join(READERS)}"
    )
