"""Item titles, read from the files that data sets come with."""

from pathlib import Path

from rec_jax.data.readers import pick_column
from rec_jax.data.textfile import TextFile, is_utf8, numbered_lines, where

_USUAL_NAMES = ("title", "name", "movietitle", "itemname", "itemtitle", "productname")


def read_titles(
    path: Path, ids_path: Path | None = None, *, item: str = "", with_genres: bool = False
) -> dict[str, str]:
    """Returns {item id: title}.

    Args:
      path: a MovieLens file with `item::title::genres` lines (UTF-8, or latin-1 as in MovieLens-1M), a
        RecBole .item file, or a csv or tsv file whose header names the item and the title (`title`, `name`,
        ...; of two columns, the title is the other one).
      ids_path: a file with `id id_in_path` lines, for logs whose items were renumbered.
      item: the item column of the log, which may name that of the titles too.
      with_genres: append the genres to the titles of a MovieLens file.

    Raises ValueError for a malformed line, or if the item or title column is not recognised.
    """
    _, first = next(numbered_lines(path), (0, ""))
    titles = _read_dat(path, with_genres) if "::" in first else _read_table(path, item)
    if ids_path is None:
        return titles
    file = TextFile(ids_path, " ", ["item", "original"])
    columns = file.columns(["item", "original"])
    pairs = zip(columns["item"].to_pylist(), columns["original"].to_pylist(), strict=True)
    return {item: titles[original] for item, original in pairs if original in titles}


def _read_dat(path: Path, with_genres: bool) -> dict[str, str]:
    titles = {}
    for number, line in numbered_lines(path):
        if not line:
            continue
        if not is_utf8(line):
            line = line.encode(errors="surrogateescape").decode("latin-1")
        item, *rest = line.split("::")
        if not rest:
            raise ValueError(f"{where(path, number, line)} has no '::': expected `item::title::...` (titles)")
        titles[item] = " ".join(rest) if with_genres else rest[0]
    return titles


def _read_table(path: Path, item: str) -> dict[str, str]:
    file = TextFile(path, "\t" if path.suffix in (".item", ".tsv") else ",", quotes=path.suffix != ".item")
    if path.suffix == ".item":
        file.names = [name.partition(":")[0] for name in file.names]
    item = item if item in file.names else pick_column("item", "", file.names, path)
    named = [name for name in file.names if name.lower().replace("_", "") in _USUAL_NAMES and name != item]
    if item is not None and len(file.names) == 2:
        named = [name for name in file.names if name != item]
    if item is None or len(named) != 1:
        raise ValueError(
            f"{path}: cannot find the item and title columns among {', '.join(file.names)}: call them "
            "item_id and title in the header (titles)"
        )
    columns = file.columns([item, named[0]])
    return dict(zip(columns[item].to_pylist(), columns[named[0]].to_pylist(), strict=True))
