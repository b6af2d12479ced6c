"""Delimited text files as Arrow columns: fast when all is well, exact about the line when not.

Arrow's csv parser reads millions of lines a second, but its errors do not name the line of the file.
So on a failure the file is read again, line by line in Python, to find and quote the first wrong line.
"""

import csv
import itertools
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

_BOM = b"\xef\xbb\xbf"
_DELIMITERS = {"\t": "tabs", "::": "'::'", ",": "commas", ";": "semicolons", "|": "bars", " ": "spaces"}


class TextFile:
    """A text file of one record a line.

    Blank lines are skipped and counted (`num_blank`), a byte order mark is ignored, lines may end in LF,
    CRLF or CR.

    delimiter: of fields: one character, or `::`. names: the columns of a file without a header line; None if
    the first line names them. quotes: may double quotes enclose a field, with delimiters and line ends in it?
    Raises ValueError if the file is empty, is not text, or names a column twice.
    """

    def __init__(self, path: Path, delimiter: str, names: Sequence[str] | None = None, quotes=False):
        if len(delimiter) != 1 and delimiter != "::":
            raise ValueError(f"delimiter={delimiter!r} must be one character, or '::' ({path})")
        self.path, self.delimiter, self.has_header = path, delimiter, names is None
        self._data = open_bytes(path)
        # Quoted line ends force a slower parser: only where there is a quote at all.
        self._quotes = quotes and self._data.find(b'"') >= 0
        if self._quotes and _count_byte(self._data, '"') % 2:
            *_, (number, line) = self._records()
            raise ValueError(f"{where(path, number, line)}...: from here on, a double quote has no partner")
        self.names = list(names) if names is not None else self._read_header()
        self.num_blank = 0

    def columns(self, wanted: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """The wanted columns, as strings.

        Raises ValueError, naming the line and what was expected, for a line with too few or too many fields
        or bytes that are not UTF-8.
        """
        names, delimiter, gaps = self.names, self.delimiter, []
        if delimiter == "::":  # Arrow takes one character, so the inside of `::` is an empty column.
            gaps = [f"::{i}" for i in range(len(names) - 1)]
            names, delimiter = [*itertools.chain(*zip(names, gaps, strict=False)), names[-1]], ":"
        start = len(_BOM) if self._data[:3] == _BOM else 0
        num_header_lines = next(self._records())[0] if self.has_header else 0
        try:
            table = pacsv.read_csv(
                pa.BufferReader(pa.py_buffer(self._data).slice(start)),
                pacsv.ReadOptions(column_names=names, skip_rows=num_header_lines),
                pacsv.ParseOptions(
                    delimiter=delimiter,
                    quote_char='"' if self._quotes else False,
                    newlines_in_values=self._quotes,
                ),
                pacsv.ConvertOptions(
                    include_columns=[*dict.fromkeys([*wanted, *gaps])],
                    column_types={name: pa.string() for name in names},
                ),
            )
        except pa.ArrowInvalid as error:
            self._explain(str(error))
        if any(pc.any(pc.not_equal(table[gap], "")).as_py() for gap in gaps):
            self._explain("a single ':' inside a field")
        if not table.num_rows:
            header = self.delimiter.join(self.names)
            raise ValueError(f"{self.path} holds no events, only the header line {header!r}")
        if not self._quotes:
            num_lines = _count_byte(self._data, "\n") + (self._data[-1:] != b"\n")
            self.num_blank = max(0, num_lines - table.num_rows - self.has_header)
        return {name: table[name] for name in wanted}

    def where(self, row: int) -> str:
        """`FILE, line N: 'the line'` of data row `row` (slow: for messages)."""
        return where(self.path, *next(itertools.islice(self._records(), row + self.has_header, None)))

    def _records(self) -> Iterator[tuple[int, str]]:
        """(line number, text) of each record that is not blank; a record with quotes may be many lines."""
        lines = numbered_lines(self.path)
        for number, line in lines:
            while self._quotes and line.count('"') % 2 and (following := next(lines, None)):
                line += "\n" + following[1]
            if line:
                yield number, line

    def _split(self, line: str) -> list[str]:
        if not self._quotes:
            return line.split(self.delimiter)
        return next(csv.reader(line.splitlines(keepends=True), delimiter=self.delimiter))

    def _explain(self, reason: str):
        """Raises the error for the first line that is wrong."""
        expected = len(self.names)
        for number, line in self._records():
            here = where(self.path, number, line)
            if not is_utf8(line):
                raise ValueError(f"{here} is not UTF-8 text; convert the file (iconv -f latin1 -t utf8)")
            fields = self._split(line)
            if self.delimiter == "::" and any(":" in field for field in fields):
                raise ValueError(f"{here} has a single ':' inside a field")
            if len(fields) != expected:
                raise ValueError(
                    f"{here} has {count(len(fields), 'field')}, expected {expected} "
                    f"({self.delimiter.join(self.names)}) separated by {self.delimiter!r}"
                    + delimiter_hint(line.strip(), self.delimiter)
                )
        raise ValueError(f"{self.path} cannot be read as text separated by {self.delimiter!r}: {reason}")

    def _read_header(self) -> list[str]:
        number, line = next(self._records())
        if not is_utf8(line):
            raise ValueError(f"{where(self.path, number, line)}: the header is not UTF-8 text")
        names = [name.strip() for name in self._split(line)]
        hint = delimiter_hint(line, self.delimiter)
        if len(names) == 1 and hint:
            raise ValueError(
                f"{where(self.path, number, line)}: the header has no {self.delimiter!r}, the delimiter"
                + hint
            )
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{self.path}: the header names column {twice!r} twice; rename one of them")
        return names


def _count_byte(data: mmap.mmap, char: str) -> int:
    values, block = np.frombuffer(data, np.uint8), 1 << 24
    return sum(
        int(np.count_nonzero(values[i : i + block] == ord(char))) for i in range(0, values.size, block)
    )


def open_bytes(path: Path) -> mmap.mmap:
    """The file, mapped into memory.

    Raises ValueError for an empty file (or nothing but blanks), a compressed one, or one with NUL bytes.
    """
    empty = ValueError(f"{path} is empty: expected at least one event")
    if path.stat().st_size == 0:
        raise empty
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    head = data[:4096]
    if head[:2] == b"\x1f\x8b":
        raise ValueError(f"{path} is gzip-compressed: decompress it first (gunzip {path.name})")
    if b"\0" in head:
        raise ValueError(f"{path} is not UTF-8 text: it has NUL bytes (UTF-16, or a binary format?)")
    if not head.removeprefix(_BOM).strip() and not data[:].removeprefix(_BOM).strip():
        raise empty
    return data


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line without its end) of a file; bytes that are not UTF-8 become surrogates."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            yield number, line.removesuffix("\n")


def head_lines(path: Path, limit: int = 1000) -> list[str]:
    """Up to `limit` first lines that are not blank, for guessing a format."""
    return list(itertools.islice((line for _, line in numbered_lines(path) if line.strip()), limit))


def is_utf8(line: str) -> bool:
    return not any("\udc80" <= char <= "\udcff" for char in line)


def where(path: Path, number: int, line: str) -> str:
    line = line.encode(errors="surrogateescape").decode(errors="replace")
    return f"{path}, line {number}: {line if len(line) <= 80 else line[:77] + '...'!r}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def delimiter_hint(line: str, delimiter: str) -> str:
    """Says what else seems to separate the fields and which option sets it, or nothing."""
    others = [other for other in _DELIMITERS if other in line and other not in delimiter]
    if not others or (delimiter in line and not (delimiter == ":" and "::" in line)):
        return ""
    return f"; it holds {_DELIMITERS[others[0]]}: set delimiter={others[0]!r}, or another format"
