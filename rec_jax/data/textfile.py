"""Delimited text files as Arrow columns: fast to read, with exact line numbers in errors.

Arrow's csv parser reads millions of lines per second, but its errors do not name the line of the file. So on
an error, the file is read again, line by line in Python, to find and quote the first wrong line.
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
    """A text file with one record per line.

    Blank lines are skipped and counted (`num_blank`), a byte order mark is ignored, and lines may end in LF,
    CRLF or CR.

    delimiter: separates fields: one character, or `::`. names: the columns of a file without a header line;
    None if the first line is the header. quotes: whether a field in double quotes may contain delimiters and
    line ends.
    Raises ValueError if the file is empty, is not text, or has two columns with one name.
    """

    def __init__(self, path: Path, delimiter: str, names: Sequence[str] | None = None, quotes=False):
        if len(delimiter) != 1 and delimiter != "::":
            raise ValueError(f"delimiter={delimiter!r} must be one character or '::' ({path})")
        self.path, self.delimiter, self.has_header = path, delimiter, names is None
        self._data = open_bytes(path)
        # Quoted line ends need a slower parser, so use it only if the file contains a quote.
        self._quotes = quotes and self._data.find(b'"') >= 0
        if self._quotes and _count_byte(self._data, '"') % 2:
            *_, (number, line) = self._records()
            raise ValueError(
                f"{where(path, number, line)}: a double quote opened in this line is never closed: close it, "
                "or write a quote inside a quoted field as two"
            )
        self.names = list(names) if names is not None else self._read_header()
        self.num_blank = 0

    def columns(self, wanted: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """Returns the wanted columns, as strings.

        Raises ValueError with the line and what was expected if a line has too few or too many fields, or
        bytes that are not UTF-8.
        """
        names, delimiter, gaps = self.names, self.delimiter, []
        if delimiter == "::":  # Arrow allows one character, so read an empty column between the two.
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
            self._explain("a field contains a single ':'")
        if not table.num_rows:
            header = self.delimiter.join(self.names)
            raise ValueError(f"{self.path} contains no events, only the header line {header!r}")
        if not self._quotes:
            num_lines = _count_byte(self._data, "\n") + (self._data[-1:] != b"\n")
            self.num_blank = max(0, num_lines - table.num_rows - self.has_header)
        return {name: table[name] for name in wanted}

    def where(self, row: int) -> str:
        """Returns `FILE, line N: 'the line'` for a data row. Slow, for error messages only."""
        return where(self.path, *next(itertools.islice(self._records(), row + self.has_header, None)))

    def _records(self) -> Iterator[tuple[int, str]]:
        """Yields (line number, text) of each record that is not blank; a quoted record may span lines."""
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
        """Raises the error for the first wrong line."""
        expected = len(self.names)
        for number, line in self._records():
            location = where(self.path, number, line)
            if not is_utf8(line):
                raise ValueError(f"{location} is not UTF-8 text: convert the file (iconv -f latin1 -t utf8)")
            fields = self._split(line)
            if self.delimiter == "::" and any(":" in field for field in fields):
                raise ValueError(f"{location} has a single ':' inside a field: remove it")
            if len(fields) != expected:
                raise ValueError(
                    f"{location} has {count(len(fields), 'field')}, expected {expected} "
                    f"({self.delimiter.join(self.names)}) separated by {self.delimiter!r}"
                    + delimiter_hint(line.strip(), self.delimiter)
                )
        raise ValueError(f"{self.path} cannot be read as text separated by {self.delimiter!r}: {reason}")

    def _read_header(self) -> list[str]:
        number, line = next(self._records())
        if not is_utf8(line):
            raise ValueError(
                f"{where(self.path, number, line)}: the header is not UTF-8 text: convert the file "
                "(iconv -f latin1 -t utf8)"
            )
        names = [name.strip() for name in self._split(line)]
        hint = delimiter_hint(line, self.delimiter)
        if len(names) == 1 and hint:
            raise ValueError(
                f"{where(self.path, number, line)}: the header does not contain the delimiter "
                f"{self.delimiter!r}{hint}"
            )
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"{where(self.path, number, line)}: the header has two columns {repeated!r}: rename one"
            )
        return names


def _count_byte(data: mmap.mmap, char: str) -> int:
    values, block = np.frombuffer(data, np.uint8), 1 << 24
    return sum(
        int(np.count_nonzero(values[i : i + block] == ord(char))) for i in range(0, values.size, block)
    )


def open_bytes(path: Path) -> mmap.mmap:
    """Maps the file into memory.

    Raises ValueError if the file is empty or blank, is compressed, or has NUL bytes.
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
        raise ValueError(f"{path} is not UTF-8 text: it has NUL bytes. If it is UTF-16, convert it (iconv)")
    if not head.removeprefix(_BOM).strip() and not data[:].removeprefix(_BOM).strip():
        raise empty
    return data


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, line without its end) of a file. Bytes that are not UTF-8 become surrogates."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            yield number, line.removesuffix("\n")


def head_lines(path: Path, limit: int = 1000) -> list[str]:
    """Returns the first `limit` lines that are not blank, to detect a format."""
    return list(itertools.islice((line for _, line in numbered_lines(path) if line.strip()), limit))


def is_utf8(line: str) -> bool:
    return not any("\udc80" <= char <= "\udcff" for char in line)


def where(path: Path, number: int, line: str) -> str:
    line = line.encode(errors="surrogateescape").decode(errors="replace")
    return f"{path}, line {number}: {line if len(line) <= 80 else line[:77] + '...'!r}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def delimiter_hint(line: str, delimiter: str) -> str:
    """Returns a hint about another delimiter that the line contains, or ""."""
    others = [other for other in _DELIMITERS if other in line and other not in delimiter]
    if not others or (delimiter in line and not (delimiter == ":" and "::" in line)):
        return ""
    return f"; the line contains {_DELIMITERS[others[0]]}: set delimiter={others[0]!r}, or another format"
