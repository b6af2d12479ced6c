"""Content vectors of items, independent of the interactions: from a file, titles or attributes."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from rec_jax.data.cooccurrence import cooccurrence_vectors
from rec_jax.data.datasets import Dataset, resolve_path
from rec_jax.data.textfile import count
from rec_jax.data.titles import read_titles

_HINT = "set semantic_ids.content to vectors (.npy, .npz), attributes (.json) or titles (SemanticIdsConfig)"


def content_vectors(content: str, dims: int, dataset: Dataset, titles_ids: str = "") -> tuple:
    """Returns (vectors, text): f32[V + 1, F] of length 1, with zeros for padding; a line about their source.

    Items without content have the zero vector; the line counts them.

    Args:
      content: a path, looked up like data.path:
        .npy: numbers [V, F] in the order of `histories.item_ids[1:]` (vocabulary.json);
        .npz: arrays `ids` [N] and `vectors` [N, F]; any vectors, for instance those of a trained model;
        .json: an object {item id: list of attributes};
        a file of titles as for data.titles; genres count as words;
        "": the titles of the data set, or the interests of a simulated world; without either, which items
        occur together in the training histories (`data.cooccurrence`).
      dims: F of vectors made from words and attributes, which are hashed.
      titles_ids: as in DataConfig, for a file of titles.

    Raises:
      ValueError: the number of vectors is wrong, the file cannot be read, or no item has content.
    """
    ids = [str(name) for name in dataset.histories.item_ids[1:]]
    path = resolve_path(content, "semantic_ids.content") if content else None
    source = path.name if path else "the training histories"
    if path and path.suffix in (".npy", ".npz"):
        vectors = _read_vectors(path, ids)
    elif path is None and not (tokens := _known_tokens(dataset)):
        vectors = cooccurrence_vectors(dataset.histories, dataset.split)[1:]
    else:
        if path:
            tokens = _read_attributes(path) if path.suffix == ".json" else _read_words(path, titles_ids)
        else:
            source = "the titles" if dataset.world is None else "the simulated interests"
        vectors = hashed_tokens([tokens[name] if name in tokens else [] for name in ids], dims)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    num_unknown = int((norms == 0).sum())
    if num_unknown == len(ids):
        raise ValueError(
            f"semantic_ids.content={content!r} has no content for any item of the log, such as item "
            f"{ids[0]!r}: {_HINT}"
        )
    vectors = np.pad(vectors / np.where(norms == 0, 1, norms), ((1, 0), (0, 0))).astype(np.float32)
    num_distinct = len(np.unique(vectors[1:], axis=0))
    text = (
        f"content from {source}: {count(len(ids), 'item')}, {count(num_distinct, 'distinct vector')}, "
        f"{count(num_unknown, 'item')} without content"
    )
    return vectors, text


def content_digest(content: str, dataset: Dataset) -> str:
    """sha256 of the content that `content_vectors` would read."""
    if content:
        return hashlib.sha256(resolve_path(content, "semantic_ids.content").read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(dataset.histories.titles, sort_keys=True).encode()).hexdigest()


def hashed_tokens(tokens: list[list[str]], dims: int) -> np.ndarray:
    """f32[N, dims]: bags of tokens. The hash of a token gives its dim and its sign; its weight is
    1 + log(N / items that have it).

    Source: Weinberger et al., ICML'09 (arXiv 0902.2206), for the sign.
    """
    counts = Counter(token for bag in tokens for token in set(bag))
    dims_and_signs = {token: _dim_and_sign(token, dims) for token in counts}
    out = np.zeros((len(tokens), dims), np.float32)
    for item, bag in enumerate(tokens):
        for token in sorted(set(bag)):
            dim, sign = dims_and_signs[token]
            out[item, dim] += sign * (1 + np.log(len(tokens) / counts[token]))
    return out


def _dim_and_sign(token: str, dims: int) -> tuple[int, int]:
    number = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")
    return (number >> 1) % dims, 1 - 2 * (number & 1)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _known_tokens(dataset: Dataset) -> dict[str, list[str]]:
    if dataset.world is not None:
        pairs = zip(dataset.world.first_V, dataset.world.second_V, strict=True)
        return {f"i{item}": [f"first {a}", f"second {b}"] for item, (a, b) in enumerate(pairs)}
    return {item: _words(title) for item, title in dataset.histories.titles.items()}


def _read_words(path: Path, titles_ids: str) -> dict[str, list[str]]:
    ids_path = resolve_path(titles_ids, "titles_ids") if titles_ids else None
    return {item: _words(text) for item, text in read_titles(path, ids_path, with_genres=True).items()}


def _read_attributes(path: Path) -> dict[str, list[str]]:
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"semantic_ids.content={str(path)!r} is not valid JSON ({error}): {_HINT}"
        ) from error
    if not isinstance(read, dict) or not all(isinstance(bag, list) for bag in read.values()):
        raise ValueError(
            f"semantic_ids.content={str(path)!r} must be one JSON object {{item id: list of attributes}}: "
            f"{_HINT}"
        )
    return {item: [str(token) for token in bag] for item, bag in read.items()}


def _read_vectors(path: Path, ids: list[str]) -> np.ndarray:
    read = np.load(path)
    if path.suffix == ".npz":
        if not {"ids", "vectors"} <= set(read.files):
            raise ValueError(
                f"semantic_ids.content={str(path)!r} has the arrays {', '.join(read.files)}, but needs "
                f"`ids` and `vectors`: {_HINT}"
            )
        vectors, index = read["vectors"], {str(name): number for number, name in enumerate(read["ids"])}
        unknown = len(vectors)  # the index of a zero vector
        vectors = np.pad(vectors, ((0, 1), (0, 0)))
        read = vectors[[index.get(name, unknown) for name in ids]]
    if read.ndim != 2 or len(read) != len(ids):
        raise ValueError(
            f"semantic_ids.content={str(path)!r} has shape {list(read.shape)}, but the log has {len(ids)} "
            "items: give one vector per item, in the order of the prepared vocabulary.json, or an .npz with "
            "`ids` (SemanticIdsConfig)"
        )
    if not np.isfinite(read).all():
        raise ValueError(
            f"semantic_ids.content={str(path)!r} contains NaN or infinity: replace them (SemanticIdsConfig)"
        )
    return read.astype(np.float32)
