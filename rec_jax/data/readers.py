"""One reader a format: a file to columns, as they stand in the file."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
from tqdm import tqdm

from rec_jax.data.textfile import TextFile, count, head_lines, is_utf8, numbered_lines, open_bytes, where

# How columns are called when nobody says, in lower case and without "_".
_USUAL_NAMES = {
    "user": ("userid", "user", "uid"),
    "item": ("itemid", "item", "movieid"),
    "time": ("timestamp", "time"),
    "rating": ("rating",),
}


@dataclass(frozen=True)
class ColumnNames:
    """Which columns to read; "" takes the usual name if there is one."""

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
    where: Callable[[int], str]  # row -> where it stands and what it says, for messages
    times: pa.ChunkedArray | None = None
    ratings: pa.ChunkedArray | None = None
    features: dict[str, pa.ChunkedArray] = field(default_factory=dict)
    whole_ids: bool = False  # the format knows only whole numbers as ids
    titles: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_sasrec(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """`user item` lines, each user's in time order. Source: Kang & McAuley, ICDM'18, data format."""
    _refuse_names(names, "sasrec", "user and item")
    return _read_named(TextFile(path, delimiter or " ", ["user", "item"]), ColumnNames(), whole_ids=True)


def read_sequences(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """`user item item ...` lines, oldest item first, one line a user; separated by blanks by default."""
    _refuse_names(names, "sequences", "user and items")
    open_bytes(path)  # for its checks
    items, lengths, line_of_user, num_blank = [], [], {}, 0
    for number, line in numbered_lines(path):
        if not line.strip():
            num_blank += 1
            continue
        user, *its_items = line.split(delimiter or None)
        if not its_items or not is_utf8(line):
            raise ValueError(
                f"{where(path, number, line)}: expected `user item item ...` separated by "
                f"{delimiter!r}, as UTF-8 text" + (" (or set delimiter)" if not delimiter else "")
            )
        if user in line_of_user:
            raise ValueError(
                f"{where(path, number, line)}: user {user} has line {line_of_user[user]} already; the "
                "sequences format has one line a user (for `user item` lines set format='sasrec')"
            )
        line_of_user[user] = number
        items += its_items
        lengths.append(len(its_items))
    rows = np.repeat(np.arange(len(lengths)), lengths)

    def where_event(row: int) -> str:
        number = [*line_of_user.values()][rows[row]]
        line = next(line for at, line in numbered_lines(path) if at == number)
        return f"{where(path, number, line)} (item {items[row]})"

    return Columns(
        pa.chunked_array([pa.array([*line_of_user], pa.string()).take(pa.array(rows))]),
        pa.chunked_array([pa.array(items, pa.string())]),
        where_event,
        whole_ids=True,
        notes=_blank_note(num_blank),
    )


def read_movielens(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """GroupLens files: `user::item::rating::time` (ratings.dat), tabs (u.data), or ratings.csv."""
    if path.suffix == ".csv":
        return _read_named(TextFile(path, delimiter or ",", quotes=True), names, whole_ids=True)
    _refuse_names(names, "movielens", "user, item, rating and time")
    seen = "\t" if "\t" in head_lines(path, 1)[0] else "::"
    file = TextFile(path, delimiter or seen, ["user", "item", "rating", "time"])
    return _read_named(file, ColumnNames(), whole_ids=True)


def read_csv(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """A header line, then a line an event; commas, or tabs in a .tsv file, unless a delimiter is given."""
    usual = "\t" if path.suffix == ".tsv" else ","
    return _read_named(TextFile(path, delimiter or usual, quotes=True), names)


def read_recbole(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """A RecBole atomic file: the header types each column (`user_id:token`), fields are separated by tabs."""
    file = TextFile(path, delimiter or "\t")
    untyped = [name for name in file.names if ":" not in name]
    if untyped:
        raise ValueError(
            f"{path}: header column {untyped[0]!r} has no type; an atomic file has columns like "
            "user_id:token (for a plain header set format='csv' and delimiter)"
        )
    file.names = [name.rpartition(":")[0] for name in file.names]
    return _read_named(file, names)


def read_parquet(path: Path, names: ColumnNames, delimiter: str) -> Columns:
    """A Parquet file with named columns."""
    if delimiter:
        raise ValueError(f"delimiter={delimiter!r} has no use in a Parquet file ({path})")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: expected at least one event")
    try:
        available = papq.read_schema(path).names
        picked = _pick_all(names, available, path)
        table = papq.read_table(path, columns=[*dict.fromkeys(picked.values())])
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    if not table.num_rows:
        raise ValueError(f"{path} holds no events")
    return _columns(table, picked, lambda row: f"{path}, row {row + 1}")


def read_tfds(name: str) -> Columns:
    """MovieLens from TensorFlow Datasets, such as `movielens/1m-ratings`.

    Only the first use needs a network and, for the 100k and 1m sets, TensorFlow. Rows come in the order of
    TFDS, which shuffles.
    """
    if not re.fullmatch(r"movielens/[\w-]+-ratings(:[\d.]+)?", name):
        raise ValueError(f"path={name!r} is not a rating set of TFDS MovieLens, such as movielens/1m-ratings")
    import tensorflow_datasets as tfds
    import tensorflow_datasets.structured.movielens  # noqa: F401  registers itself

    instead = "or download MovieLens from grouplens.org and read its ratings file (format='movielens')"
    try:
        source = tfds.data_source(name, split="train")
    except ImportError as error:
        raise ValueError(
            f"TFDS needs TensorFlow to prepare {name!r} (once; reading needs none): install it with "
            f"pip install 'rec_jax[tensorflow]', {instead} ({error})"
        ) from error
    except Exception as error:  # TFDS and its downloader raise a dozen unrelated types
        raise ValueError(
            f"TFDS cannot provide {name!r} ({type(error).__name__}: {error}). Its first use needs a network: "
            f"try again with one, {instead}"
        ) from error
    fields = ("user_id", "movie_id", "timestamp", "user_rating", "movie_title")
    # About 0.3 ms an element, most of it in TFDS: minutes for a million, once a prepared data set.
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
    """The column for `kind`: the given one, or the only one with a usual name, or None.

    Raises ValueError listing the columns if the given one is not there, or two have a usual name.
    """
    listed = f"the columns are {', '.join(available)}"
    if given:
        if given in available:
            return given
        near = difflib.get_close_matches(given, available, n=1)
        near = near or [name for name in available if name.lower() == given.lower()]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if all(re.fullmatch(r"[\d.]*", name) for name in available):
            hint = "; the first line must name the columns, and it seems to be an event"
        raise ValueError(f"{path} has no column {given!r} (set {kind}): {listed}{hint}")
    usual = [name for name in available if name.lower().replace("_", "") in _USUAL_NAMES[kind]]
    if len(usual) > 1:
        raise ValueError(f"{path}: the {kind} could be any of {', '.join(usual)}; set {kind}")
    return usual[0] if usual else None


def _pick_all(names: ColumnNames, available: Sequence[str], path: Path) -> dict[str, str]:
    picked = {kind: pick_column(kind, getattr(names, kind), available, path) for kind in _USUAL_NAMES}
    for kind in ("user", "item"):
        if picked[kind] is None:
            raise ValueError(
                f"{path}: which column is the {kind}? Set {kind} to one of its columns: "
                f"{', '.join(available)} (a file without a header line needs one)"
            )
    for name in names.features:
        picked[f"feature {name}"] = pick_column("features", name, available, path)
    return {kind: name for kind, name in picked.items() if name}


def _read_named(file: TextFile, names: ColumnNames, whole_ids: bool = False) -> Columns:
    picked = _pick_all(names, file.names, file.path)
    table = file.columns([*dict.fromkeys(picked.values())])
    return _columns(table, picked, file.where, whole_ids, _blank_note(file.num_blank))


def _columns(table, picked: dict[str, str], where, whole_ids=False, notes=()) -> Columns:
    said = ", ".join(f"{kind}={name}" for kind, name in picked.items() if not kind.startswith("feature "))
    return Columns(
        table[picked["user"]],
        table[picked["item"]],
        where,
        table[picked["time"]] if "time" in picked else None,
        table[picked["rating"]] if "rating" in picked else None,
        {kind[8:]: table[name] for kind, name in picked.items() if kind.startswith("feature ")},
        whole_ids,
        notes=(f"columns: {said}", *notes),
    )


def _blank_note(num_blank: int) -> tuple[str, ...]:
    return (f"{count(num_blank, 'blank line')} skipped",) if num_blank else ()


def _refuse_names(names: ColumnNames, format: str, fixed: str) -> None:
    given = [kind for kind in ("user", "item", "time", "rating", "features") if getattr(names, kind)]
    if given:
        raise ValueError(
            f"{given[0]}={getattr(names, given[0])!r} has no use: the {format} format has no header, its "
            f"columns are {fixed}"
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
    """(format, what it was told by), from the name and the first lines of a file.

    Raises ValueError where they do not tell.
    """
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".pq"):
        return "parquet", f"by its name (*{suffix})"
    open_bytes(path)  # for its checks
    lines = head_lines(path)
    if suffix == ".inter":
        return "recbole", "by its name (*.inter)"
    if suffix == ".csv" and [x.strip() for x in lines[0].split(",")][:2] == ["userId", "movieId"]:
        return "movielens", "by its header"
    if suffix in (".csv", ".tsv"):
        return "csv", f"by its name (*{suffix})"
    if "::" in lines[0] or path.name == "u.data":
        return "movielens", "by '::' in its first line" if "::" in lines[0] else "by its name"
    if all(re.fullmatch(r"[-+\w]+(\s+[-+\w]+)*\s*", line) for line in lines):
        fields = [line.split() for line in lines]
        num_pairs = sum(len(x) == 2 for x in fields)
        users_repeat = len({x[0] for x in fields}) < len(fields)
        seen = f"by its first {count(len(lines), 'line')}"
        if num_pairs == len(fields) or (users_repeat and num_pairs > len(fields) / 2):
            return "sasrec", f"{seen}, of two ids each"
        if not users_repeat and len({len(x) for x in fields}) > 1:
            return "sequences", f"{seen}, of various lengths, one a user"
    raise ValueError(
        f"{where(path, 1, lines[0])}: cannot tell the format from this line; set format to one of "
        f"{', '.join(READERS)}"
    )
