"""A compressed model in one file: integers as integers, pruned arrays without their zeros.

An .npz of two arrays: `data`, all bytes in a row, and `manifest`, JSON that says what they are. An array with
enough zeros is stored as a bitmap and the numbers that are not zero. The zip format checks that all is whole.
"""

import json
import math
import os
import pathlib
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np

from rec_jax.compress.quant import pack_leaf, unpack_leaf

NAME = "model.npz"


def exists(folder) -> bool:
    return (pathlib.Path(folder) / NAME).exists()


def remove(folder) -> None:
    (pathlib.Path(folder) / NAME).unlink(missing_ok=True)


def save(folder, params) -> int:
    """Writes `params`, a nested dict whose leaves are arrays or quantized, to folder/model.npz, through a
    temporary file. Returns its size in bytes."""
    chunks, manifest = [], {}
    for name, leaf in _flatten(params).items():
        kind, parts, meta = pack_leaf(leaf)
        stored = {part: _pack(np.asarray(array), chunks) for part, array in parts.items()}
        manifest[name] = {"kind": kind, "meta": meta, "parts": stored}
    path = pathlib.Path(folder) / NAME
    partial = path.with_suffix(".partial")
    text = json.dumps(manifest, separators=(",", ":")).encode()
    arrays = {"manifest": text, "data": b"".join(chunks)}
    with open(partial, "wb") as file:
        np.savez_compressed(file, **{key: np.frombuffer(value, np.uint8) for key, value in arrays.items()})
    os.replace(partial, path)
    return path.stat().st_size


def load(folder) -> dict:
    """The params that `save` wrote.

    Raises ValueError if the file is not whole.
    """
    path = pathlib.Path(folder) / NAME
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            manifest, data = json.loads(arrays["manifest"].tobytes()), arrays["data"]
    except (zipfile.BadZipFile, KeyError, EOFError, OSError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} cannot be read back ({error}): compress the run again") from error
    params = {}
    for name, entry in manifest.items():
        parts = {part: jnp.asarray(_unpack(data, stored)) for part, stored in entry["parts"].items()}
        _put(params, name, unpack_leaf(entry["kind"], parts, entry["meta"]))
    return params


def _pack(array, chunks: list) -> dict:
    """Appends the bytes of an array and says what they are."""
    stored = {"at": sum(map(len, chunks)), "shape": array.shape, "dtype": str(array.dtype)}
    numbers = array.reshape(-1)
    is_zero = numbers == 0
    if is_zero.sum() * array.itemsize > array.size / 8:
        chunks.append(np.packbits(~is_zero).tobytes())
        numbers = numbers[~is_zero]
        stored["kept"] = len(numbers)
    chunks.append(numbers.tobytes())
    return stored


def _unpack(data, stored: dict):
    shape, dtype = stored["shape"], jnp.dtype(stored["dtype"])
    size, at = math.prod(shape), stored["at"]
    if "kept" not in stored:
        return data[at : at + size * dtype.itemsize].view(dtype).reshape(shape)
    middle = at + math.ceil(size / 8)
    is_kept = np.unpackbits(data[at:middle], count=size).astype(bool)
    numbers = np.zeros(size, dtype)
    numbers[is_kept] = data[middle : middle + stored["kept"] * dtype.itemsize].view(dtype)
    return numbers.reshape(shape)


def _flatten(tree, prefix="") -> dict:
    """{"blocks/#0/ff/up/kernel": leaf}: # marks keys that are integers."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves = {}
    for key, value in tree.items():
        text = f"#{key}" if isinstance(key, int) else key
        leaves |= _flatten(value, f"{prefix}/{text}" if prefix else text)
    return leaves


def _put(tree: dict, name: str, leaf) -> None:
    *groups, last = (int(key[1:]) if key[0] == "#" else key for key in name.split("/"))
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[last] = leaf
