"""Versioned folders of arrays, with checksums that are verified when a version is read.

    root/current     name of the current version
    root/000007/     a version: about.json, and one .npy file per array, memory-mapped when it is read

A version is written completely before os.replace moves the pointer to it, so a killed process leaves either
the old or the new version current. The previous version is kept: a process that is reading it can finish, and
it replaces the current version if that is damaged.

An array with many zeros, as pruning leaves them, can be packed: its file then holds a bitmap and the nonzero
numbers.
"""

import json
import math
import os
import shutil
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rec_jax import processes
from rec_jax.data.strings import Strings

FORMAT = 1  # increase it when the files or their meaning change
OTHER_VERSION = "trained by another version of rec_jax: train again"
_POINTER, _ABOUT = "current", "about.json"
_KEPT = 2  # number of versions kept, including the current one


class DamagedError(ValueError):
    """A version cannot be read back: a file is missing, truncated or altered."""


class Writer:
    """Writes one new version. Only the first process writes; all processes must pass the same arrays.

    writer = Writer(root)
    about["table"] = writer.array("table", table)
    writer.publish(about)
    """

    def __init__(self, root: Path):
        numbers = [int(path.name) for path in root.glob("[0-9]*") if path.name.isdigit()]
        self._root, self._folder, self._files = root, root / f"{max(numbers, default=0) + 1:06d}", {}
        if processes.is_first():
            self._folder.mkdir(parents=True)

    def array(self, name: str, array, pack: bool = False) -> dict:
        """Writes NAME.npy and returns the entry that `read_array` takes.

        pack: store a bitmap and the nonzero numbers, if that is smaller.
        """
        array = processes.whole(array)
        if not processes.is_first():
            return {}
        entry = {"file": f"{name}.npy", "shape": array.shape, "dtype": str(array.dtype)}
        is_zero = array.reshape(-1) == 0 if pack else np.zeros(1, bool)
        if is_zero.sum() * array.itemsize > array.size / 8:
            kept = array.reshape(-1)[~is_zero]
            entry["kept"] = kept.size
            array = np.concatenate([np.packbits(~is_zero), np.frombuffer(kept.tobytes(), np.uint8)])
        np.save(self._folder / entry["file"], _bits(array))
        return self._recorded(entry)

    def chunked(self, name: str, num_rows: int, chunks) -> dict:
        """Writes an array from an iterator of consecutive blocks along its first dim, one block at a time."""
        entry, file, done = {}, None, 0
        for chunk in chunks:
            if not processes.is_first():
                continue
            if file is None:
                shape = num_rows, *chunk.shape[1:]
                entry = {"file": f"{name}.npy", "shape": shape, "dtype": str(chunk.dtype)}
                path = self._folder / entry["file"]
                file = np.lib.format.open_memmap(path, "w+", _bits(chunk).dtype, shape)
            file[done : done + len(chunk)] = _bits(chunk)
            done += len(chunk)
        if not processes.is_first():
            return {}
        file.flush()
        return self._recorded(entry)

    def strings(self, name: str, texts) -> dict:
        strings = Strings.of(texts)
        return {part: self.array(f"{name}.{part}", getattr(strings, part)) for part in ("data", "ends")}

    def link(self, tree, folder: Path, about: dict) -> None:
        """Links the files of all entries in a tree from another version into this one."""
        for entry in _entries(tree) if processes.is_first() else ():
            name = entry["file"]
            link(folder / name, self._folder / name)
            self._files[name] = about["files"][name]

    def publish(self, about: dict) -> None:
        """Completes the version, makes it the current one and removes old versions."""
        if processes.is_first():
            text = json.dumps(about | {"format": FORMAT, "files": self._files})
            checked = {"crc32": zlib.crc32(text.encode()), "about": text}
            (self._folder / _ABOUT).write_text(json.dumps(checked))
            partial = self._root / f"{_POINTER}.partial"
            partial.write_text(self._folder.name)
            os.replace(partial, self._root / _POINTER)
            for folder in sorted(self._root.glob("[0-9]*"))[:-_KEPT]:
                shutil.rmtree(folder, ignore_errors=True)
        processes.wait_for_all()

    def _recorded(self, entry: dict) -> dict:
        path = self._folder / entry["file"]
        self._files[entry["file"]] = [path.stat().st_size, _crc32(path)]
        return entry


def link(source, target) -> None:
    """Makes a hard link, or a copy if the file system does not support links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def newest(root: Path) -> tuple[Path, dict]:
    """Returns (folder, about) of the current version, after a check of all its files. If it is damaged, says
    so on stderr and returns the newest intact version instead.

    Raises:
      DamagedError: no version is intact.
      ValueError: another version of rec_jax wrote it.
    """
    named = (root / _POINTER).read_text().strip()
    others = sorted((path.name for path in root.glob("[0-9]*") if path.name != named), reverse=True)
    damages = []
    for name in [named, *others]:
        try:
            about = check(root / name)
        except DamagedError as error:
            print(f"model: {error}", file=sys.stderr, flush=True)
            damages.append(str(error))
            continue
        if damages:
            print(f"model: falling back to {root / name}", file=sys.stderr, flush=True)
        return root / name, about
    raise DamagedError(f"no version in {root} can be read back. {'; '.join(damages)}")


def current(root: Path) -> tuple[Path, dict] | None:
    """Returns (folder, about) of the current version, its files unchecked; None if it cannot be read."""
    try:
        folder = root / (root / _POINTER).read_text().strip()
        return folder, read_about(folder)
    except (OSError, ValueError):
        return None


def exists(root: Path) -> bool:
    return (root / _POINTER).exists()


def read_about(folder: Path) -> dict:
    try:
        file = json.loads((folder / _ABOUT).read_text())
        text = file["about"]
        is_whole = zlib.crc32(text.encode()) == file["crc32"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(f"{folder / _ABOUT} cannot be read ({error})") from error
    if not is_whole:
        raise DamagedError(f"{folder / _ABOUT} has another checksum than when it was written")
    about = json.loads(text)
    if about["format"] != FORMAT:
        raise ValueError(
            f"{folder} has format {about['format']}, but this version of rec_jax reads format {FORMAT}: the "
            f"model was {OTHER_VERSION}"
        )
    return about


def read_array(folder: Path, entry: dict) -> np.ndarray:
    """Returns a memory map; of a packed array, an array in memory."""
    shape, dtype = tuple(entry["shape"]), jnp.dtype(entry["dtype"])
    size = math.prod(shape)
    array = np.load(folder / entry["file"], mmap_mode="r" if size else None)
    if "kept" not in entry:
        return array.view(dtype)
    middle = math.ceil(size / 8)
    numbers = np.zeros(size, dtype)
    numbers[np.unpackbits(array[:middle], count=size).astype(bool)] = np.array(array[middle:]).view(dtype)
    return numbers.reshape(shape)


def read_strings(folder: Path, entry: dict) -> Strings:
    return Strings(read_array(folder, entry["data"]), read_array(folder, entry["ends"]))


def check(folder: Path) -> dict:
    """Returns the content of about.json. Raises DamagedError, naming the file, if any file has changed."""
    about = read_about(folder)
    for name, (size, digest) in about["files"].items():
        path = folder / name
        if not path.exists():
            raise DamagedError(f"{path} is missing")
        if path.stat().st_size != size:
            raise DamagedError(f"{path} has {path.stat().st_size:,} bytes, but {size:,} were written")
        if _crc32(path) != digest:
            raise DamagedError(f"{path} has another checksum than when it was written")
    return about


def _bits(array: np.ndarray) -> np.ndarray:
    """Returns the array, or its bits as unsigned integers if .npy does not support its dtype (bf16)."""
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array


def _crc32(path: Path) -> int:
    digest = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest = zlib.crc32(block, digest)
    return digest


def _entries(tree):
    """Yields the entries of `Writer.array` and `Writer.chunked` in a nested dict."""
    if isinstance(tree, dict) and "file" in tree:
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _entries(value)
