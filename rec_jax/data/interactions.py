"""The interaction log: users, items, times and other columns, read from a file.

Nothing is changed or skipped silently: a line that no rule covers raises a ValueError that quotes it, and
`InteractionLog.notes` counts what the rules change or leave out.
"""

import contextlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rec_jax.data.readers import READERS, ColumnNames, Columns, detect_format, read_tfds
from rec_jax.data.textfile import count

FORMATS = ("auto", *READERS, "tfds")
MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_YEAR_2100 = 4_102_444_800


@dataclass(frozen=True)
class InteractionLog:
    """Columns with one entry per event. Users are numbered from 0, items from 1 (0 is padding).

    users: int32[N] in 0..U-1. items: int32[N] in 1..V. times: int64[N] seconds UTC, or None. ratings:
    float32[N] (NaN = missing), or None. user_ids: str[U] and item_ids: str[V + 1] are the ids in the file;
    item_ids[0] == "". features: other columns of the events. titles: item id -> title, if the source has
    titles. notes: lines that say what was chosen, left out and counted while reading.

    If times is None, or times tie, the order of the entries is the order of the events.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    ratings: np.ndarray | None
    user_ids: np.ndarray
    item_ids: np.ndarray
    features: dict[str, np.ndarray] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_events(self) -> int:
        return len(self.users)


def read_log(
    path: Path | str,
    *,
    format: str = "auto",
    user: str = "",
    item: str = "",
    time: str = "",
    rating: str = "",
    features: tuple[str, ...] = (),
    delimiter: str = "",
    time_unit: str = "s",
) -> InteractionLog:
    """Reads a log of interactions.

    Ids are text: `7` and `07` differ. Formats whose ids are whole numbers (movielens, sasrec, sequences,
    tfds) accept no other ids. Rows without a user, an item or (if the log has times) a time are left out and
    counted. Times are numbers in `time_unit`, or ISO 8601 dates (UTC unless they have a time zone). Fractions
    of a second are used to order the rows, then dropped.

    Args:
      path: a file, or for format "tfds" the name of a data set (`movielens/1m-ratings`).
      format: one of FORMATS; auto detects it from the name and the content.
      user, item, time, rating, features: column names, for files with a header. Without a time column, the
        order of the file is the order of events.
      delimiter: separates fields; "" is the usual one of the format, `\\t` a tab.
      time_unit: unit of numeric times: s, ms, us or ns.

    Raises ValueError for a malformed line (with its number and text), an unknown column, an empty file or an
    implausible time; the message says what was expected and what to set.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    if time_unit not in _PER_SECOND:
        raise ValueError(f"time_unit={time_unit!r} is not one of {', '.join(_PER_SECOND)}")
    names = ColumnNames(user, item, time, rating, tuple(features))
    if format == "tfds":
        if delimiter or names != ColumnNames():
            raise ValueError("format='tfds' has fixed columns: leave user, item, ... and delimiter empty")
        return _make_log(read_tfds(str(path)), time_unit, (f"{path}: read from TFDS",))
    path, reason = Path(path), "as requested"
    if not path.is_file():
        raise ValueError(f"{path} is not a file: set path to the file of the log")
    if format == "auto":
        format, reason = detect_format(path)
    columns = READERS[format](path, names, delimiter.replace("\\t", "\t"))
    return _make_log(columns, time_unit, (f"{path}: read as {format}, {reason}",))


def compact(codes: np.ndarray, ids: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Drops ids without events, except ids[:first]. Returns (codes, ids): renumbered codes, ids in order."""
    kept = np.bincount(codes, minlength=len(ids)) > 0
    kept[:first] = True
    return (np.cumsum(kept, dtype=np.int32) - 1)[codes], ids[kept]


def _make_log(columns: Columns, time_unit: str, notes: tuple[str, ...]) -> InteractionLog:
    notes = [*notes, *columns.notes]
    users, user_ids = _encode(columns.users, "user", columns, notes)
    items, item_ids = _encode(columns.items, "item", columns, notes)
    missing = {"user": users < 0, "item": items < 0}
    times = order = ratings = None
    if columns.times is None:
        notes.append("no times: the order of the file is the order of events")
    else:
        times, missing["time"], order = _seconds(columns.times, time_unit, columns.where, notes)
    if columns.ratings is not None:
        ratings = _numbers(columns.ratings, "rating", columns.where).astype(np.float32)
    keep = np.ones(len(users), bool)
    for name, is_missing in missing.items():
        if num := int((keep & is_missing).sum()):
            notes.append(f"{count(num, 'row')} without {'an' if name == 'item' else 'a'} {name} left out")
            keep &= ~is_missing
    if ratings is not None and (num := int(np.isnan(ratings[keep]).sum())):
        notes.append(f"{count(num, 'event')} without a rating kept")
    if not keep.any():
        raise ValueError(
            f"{columns.where(0)}: no row has values for all of {', '.join(missing)}: check this "
            "line, and which columns are read"
        )
    rows = slice(None) if keep.all() and order is None else np.flatnonzero(keep)
    if order is not None:
        rows = order[keep[order]]
    users, user_ids = compact(users[rows], user_ids, 0)
    items, item_ids = compact(items[rows] + 1, np.concatenate([np.array([""], object), item_ids]), 1)
    times = times if times is None else times[rows]
    if times is not None:
        first, last = (datetime.fromtimestamp(int(t), UTC).date() for t in (times.min(), times.max()))
        notes.append(f"times from {first} to {last} (UTC)")
    return InteractionLog(
        users=users,
        items=items,
        times=times,
        ratings=ratings if ratings is None else ratings[rows],
        user_ids=user_ids,
        item_ids=item_ids,
        features={name: _feature(column)[rows] for name, column in columns.features.items()},
        titles=columns.titles,
        notes=tuple(notes),
    )


def _encode(column, kind: str, columns: Columns, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (int32[N] codes, -1 = missing; object[U] ids in order of appearance)."""
    encoded = _id_text(column, kind, columns.where).dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # an empty or a very long column
        encoded = encoded.unify_dictionaries().combine_chunks()
    raw = encoded.dictionary.to_pylist()
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int32)
    ids = [text.strip() for text in raw]
    for code, text in enumerate(raw):
        is_whole = re.fullmatch(r"0|[1-9]\d{0,18}", text, re.ASCII) and int(text) < 2**63
        problem = "contains a line end: is a double quote missing?" if "\n" in text or "\r" in text else ""
        if columns.whole_ids and not is_whole:
            problem = (
                "is not a whole number from 0 to 2^63 - 1 without leading zeros: for text ids, set "
                "format='csv' or 'parquet'"
            )
        if problem:
            raise ValueError(f"{columns.where(int(np.argmax(codes == code)))}: {kind} {text!r} {problem}")
    if num := sum(text != stripped for text, stripped in zip(raw, ids, strict=True)):
        notes.append(f"{count(num, f'{kind} id')} had blanks at the start or end: removed")
    new_codes, seen = np.full(len(ids) + 1, -1, np.int32), {}  # the last entry stays -1, for null
    for code, text in enumerate(ids):
        if text not in MISSING:
            new_codes[code] = seen.setdefault(text, len(seen))
    odd = [x for x in seen if re.fullmatch(r"-\d+|\d{19,}", x, re.ASCII) and not 0 <= int(x) < 2**63]
    if odd and not columns.whole_ids and all(re.fullmatch(r"-?\d+", text) for text in seen):
        notes.append(f"{count(len(odd), f'{kind} id')} negative or above 2^63 - 1 ({odd[0]}): kept as text")
    return new_codes[codes], np.array([*seen], object)


def _id_text(column: pa.ChunkedArray, kind: str, where) -> pa.ChunkedArray:
    """Ids as text. Whole floats become integers: pandas writes integer columns with gaps as floats."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        values = column.to_numpy()
        bad = ~np.isnan(values) & ((values != np.floor(values)) | (np.abs(values) >= 2**53))
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(f"{where(row)}: {kind} {values[row]} is not a whole number: store ids as text")
        column = pc.if_else(pc.is_nan(column), None, column).cast(pa.int64())
    elif not (pa.types.is_integer(column.type) or _is_text(column)):
        raise ValueError(
            f"{where(0)}: the {kind} column has type {column.type}, expected text or whole numbers: set "
            f"{kind} to another column, or convert it"
        )
    return column.cast(pa.string())


def _seconds(column, unit: str, where, notes) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns (int64[N] seconds UTC, bool[N] missing, row order by time; None if no time has a fraction)."""
    if _is_text(column):
        column = _parse_times(_null_missing(column), where)
    missing = pc.is_null(column, nan_is_null=True).to_numpy()
    dates = pa.types.is_temporal(column.type)
    if dates:
        if unit != "s":
            raise ValueError(f"time_unit={unit!r} has no effect: the times are dates, not numbers; remove it")
        if getattr(column.type, "tz", None) is None:
            notes.append("times have no time zone: read as UTC")
        column, unit = column.cast(pa.timestamp("us")).cast(pa.int64()), "us"
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise ValueError(
            f"{where(0)}: the time column has type {column.type}, expected numbers or dates: set time to "
            "another column, or convert it"
        )
    exact = np.where(missing, 0, pc.fill_null(column, 0).to_numpy())
    per_second = _PER_SECOND[unit]
    bad = ~missing & ~((exact >= 0) & (exact < _YEAR_2100 * per_second))  # also catches infinities
    if bad.any():
        row = int(np.argmax(bad))
        fits = [u for u, per in _PER_SECOND.items() if 10**8 * per < exact[row] < _YEAR_2100 * per]
        hint = f" in {unit}: if it is in {fits[0]}, set time_unit={fits[0]!r}" if fits and not dates else ""
        value = "" if dates else f"{exact[row]} "
        raise ValueError(f"{where(row)}: the time {value}is not between 1970 and 2100{hint}")
    seconds = (exact // per_second).astype(np.int64)
    num_fractions = int(np.count_nonzero(exact != seconds * per_second))
    if not num_fractions:
        return seconds, missing, None
    notes.append(
        f"{count(num_fractions, 'time')} had fractions of a second: used to order the rows, then dropped"
    )
    return seconds, missing, np.argsort(exact, kind="stable")


def _parse_times(column: pa.ChunkedArray, where) -> pa.ChunkedArray:
    """Text as int64 or float64 numbers, or as timestamps."""
    types = (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))
    for kind in types:
        with contextlib.suppress(pa.ArrowInvalid):
            return column.cast(kind)
    # Not all values have the same type: find the first that cannot be read like the first value.
    values = column.to_pylist()
    first = next(value for value in values if value is not None)
    readable = [kind for kind in types if _casts(first, kind)]
    row = next(
        row
        for row, value in enumerate(values)
        if value is not None and not any(_casts(value, kind) for kind in readable)
    )
    expected = "a number or an ISO 8601 date" if values[row] == first else f"a time like {first!r}"
    raise ValueError(f"{where(row)}: time {values[row]!r} is not {expected}: correct or remove the line")


def _casts(value: str, kind: pa.DataType) -> bool:
    try:
        pa.scalar(value).cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _numbers(column, kind: str, where) -> np.ndarray:
    """float64[N], NaN = missing."""
    if _is_text(column):
        column = _null_missing(column)
    try:
        values = column.cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values = column.to_pylist()
        row = next((i for i, v in enumerate(values) if isinstance(v, str) and not _casts(v, pa.float64())), 0)
        raise ValueError(
            f"{where(row)}: {kind} {values[row]!r} is not a number: correct or remove the line"
        ) from None
    if np.isinf(values).any():
        raise ValueError(f"{where(int(np.argmax(np.isinf(values))))}: the {kind} is infinite: correct it")
    return values


def _feature(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers as float64, NaN = missing; any other column as text, "" = missing."""
    if _is_text(column):
        column = _null_missing(column)
    try:
        return column.cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return np.array(["" if value is None else str(value) for value in column.to_pylist()], object)


def _is_text(column: pa.ChunkedArray) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _null_missing(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text without blanks at its ends; null if it is one of MISSING."""
    column = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.is_in(column, pa.array(MISSING, column.type)), None, column)
