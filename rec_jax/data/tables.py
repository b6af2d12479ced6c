"""Plain text tables for what was read, removed and kept."""

from collections.abc import Sequence


def format_table(title: str, header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """The rows as aligned text: numbers to the right with thousands separators, words to the left.

    A row shorter than the header is filled with blanks.
    """
    cells = [[_cell(value) for value in row] + [""] * (len(header) - len(row)) for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    numeric = [any(isinstance(row[i], int) for row in rows if i < len(row)) for i in range(len(header))]

    def line(values):
        padded = (
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([title, line(header), line(["-" * width for width in widths]), *map(line, cells)])


def _cell(value) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
