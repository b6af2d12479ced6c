"""Semantic ids: a path of codes for each item, made from its content once per run."""

import dataclasses
import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from rec_jax import processes

if TYPE_CHECKING:  # slow to import, and needed only to make semantic ids
    from rec_jax.data.datasets import DataConfig, Dataset

_FILE = "semantic_ids.npz"


@dataclass(frozen=True)
class SemanticIdsConfig:
    """Settings for making semantic ids; only generative retrieval models use them.

    content: see `data.content.content_vectors`. The codes of an item end with one more level, which
    distinguishes items whose other codes are the same: it counts them from 0, the most frequent in training
    first.
    """

    content: str = ""
    content_dims: int = 512  # dims of content vectors if words or attributes are hashed
    method: Literal["rqvae", "kmeans"] = "rqvae"
    num_levels: int = 3  # without the last level, which counts
    codebook_size: int = 0  # of each level; 0 = a quarter of the items as a power of two, at most 256
    epochs: int = 60  # rqvae
    width: int = 256  # rqvae: hidden units of the encoder and of the decoder
    latent: int = 32  # rqvae: dims that are quantised
    min_used: float = 0.5  # error if a smaller share of the codes of a level is used
    max_shared: float = 0.5  # error if a larger share of the items needs the last level to be distinguished

    def __post_init__(self):
        for name in ("content_dims", "num_levels", "epochs", "width", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 (SemanticIdsConfig)")
        if self.codebook_size < 2 and self.codebook_size != 0:
            raise ValueError(
                f"codebook_size={self.codebook_size} must be at least 2, or 0 for a size that depends on the "
                "number of items (SemanticIdsConfig)"
            )
        for name in ("min_used", "max_shared"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1] (SemanticIdsConfig)")

    def size_for(self, num_items: int) -> int:
        """The codebook size of a catalogue: the largest power of two up to a quarter of it, unless set."""
        return self.codebook_size or min(256, max(2, 1 << (num_items // 4).bit_length() >> 1))


class SemanticIds:
    """The semantic ids of a catalogue, and their trie. A constant of a module, compared by value.

    codes_VQ: int32[V + 1, Q] in 0..codebook_size - 1; no two items have the same codes. Entry 0 is padding
    and is not read. report: a line of text about the codes.
    """

    def __init__(self, codes_VQ: np.ndarray, codebook_size: int, report: str = ""):
        self.codes_VQ, self.codebook_size = np.ascontiguousarray(codes_VQ, np.int32), codebook_size
        self.num_levels, self.report = codes_VQ.shape[1], report
        items = self.codes_VQ[1:]
        if items.min() < 0 or items.max() >= codebook_size or len(np.unique(items, axis=0)) < len(items):
            raise ValueError(
                f"codes must be in 0..{codebook_size - 1}, and no two items may have the same ones "
                "(SemanticIds)"
            )

    def __eq__(self, other):
        if not isinstance(other, SemanticIds) or self.codebook_size != other.codebook_size:
            return False
        return np.array_equal(self.codes_VQ, other.codes_VQ)

    def __hash__(self):
        return hash(self.codes_VQ.tobytes())

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.codes_VQ.tobytes()).hexdigest()

    @functools.cached_property
    def trie(self) -> "Trie":
        return Trie(self)


class Trie:
    """The trie of the codes: which codes may follow a prefix. Memory is linear in the number of items.

    Level 0 has one node, the root; the nodes of level Q are the items. The nodes of a level are numbered in
    the order of their paths, so the children of a node have consecutive numbers.

    first_child: for each level q, int32[nodes of level q, plus 1]: the first child of each node. Node n has
    the children from first_child[q][n] to first_child[q][n + 1] - 1.
    codes: for each level q, int32[nodes of level q + 1]: the code that leads to each of these nodes.
    max_children: for each level q, the largest number of children of a node.
    items: int32[nodes of level Q]: the item of each.
    paths_VQ: int32[V + 1, Q]: the nodes on the path to each item; entry 0 (padding) is 0.
    """

    def __init__(self, semantic_ids: SemanticIds):
        order = np.lexsort(semantic_ids.codes_VQ[1:].T[::-1])
        self.items = (order + 1).astype(np.int32)
        node_V = np.zeros(len(order), np.int64)
        self.first_child, self.codes, self.max_children = [], [], []
        self.paths_VQ = np.zeros_like(semantic_ids.codes_VQ)
        for level, code_V in enumerate(semantic_ids.codes_VQ[1:][order].T):
            keys, child_V = np.unique(node_V * semantic_ids.codebook_size + code_V, return_inverse=True)
            num_children = np.bincount(keys // semantic_ids.codebook_size)
            self.first_child.append(np.concatenate([[0], np.cumsum(num_children)]).astype(np.int32))
            self.codes.append((keys % semantic_ids.codebook_size).astype(np.int32))
            self.max_children.append(int(num_children.max()))
            self.paths_VQ[self.items, level] = node_V = child_V


def numbered_semantic_ids(num_items: int, config: SemanticIdsConfig) -> SemanticIds:
    """Returns placeholder codes, the digits of the item's number, for uses without data."""
    num_levels, size = 1, config.size_for(num_items)
    while size**num_levels < num_items:
        num_levels += 1
    num_levels = max(num_levels, config.num_levels + 1)
    powers = size ** np.arange(num_levels - 1, -1, -1, dtype=np.int64)
    digits_VQ = np.arange(num_items)[:, None] // powers % size
    return SemanticIds(np.pad(digits_VQ, ((1, 0), (0, 0))), size, "codes are item numbers")


def make_semantic_ids(
    vectors_VF: np.ndarray, config: SemanticIdsConfig, counts_V: np.ndarray, seed: int
) -> SemanticIds:
    """Returns the semantic ids of items with content vectors f32[V + 1, F]; entry 0 is not read.

    counts_V: the number of training events of each item.
    Raises ValueError if too few codes are used, or too many items share theirs.
    """
    from rec_jax.models.quantizers import residual_kmeans, rqvae

    x_NF, size = vectors_VF[1:], config.size_for(len(vectors_VF) - 1)
    sizes = config.num_levels, size
    if config.method == "kmeans":
        codes_NQ = residual_kmeans(x_NF, *sizes, seed)[0]
    else:
        codes_NQ = rqvae(x_NF, *sizes, seed, epochs=config.epochs, width=config.width, latent=config.latent)
    used = [len(np.unique(codes_N)) / size for codes_N in codes_NQ.T]
    last_code_N, group_size_N = count_within(codes_NQ, counts_V[1:])
    shared, largest = float(np.mean(group_size_N > 1)), int(group_size_N.max())
    _check(config, size, used, shared, largest)
    codes_NQ = np.column_stack([codes_NQ, last_code_N])
    report = (
        f"codes by {config.method}: levels use {', '.join(f'{x:.0%}' for x in used)} of "
        f"{size} codes; {shared:.1%} of the items share their codes, at most {largest} the "
        "same ones, and are counted by one more level"
    )
    return SemanticIds(np.pad(codes_NQ, ((1, 0), (0, 0))), size, report)


def count_within(codes_NQ: np.ndarray, counts_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rank int[N], size int[N]): the rank of each item among the items with the same codes, and the
    number of these items.

    Ranks start at 0, the largest of `counts_N` first, so that the last code alone distinguishes frequent from
    rare items. Source: TIGER, section 3.1, which leaves the order open.
    """
    group_N = np.unique(codes_NQ, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.lexsort((-counts_N, group_N))
    sizes = np.bincount(group_N)
    rank_N = np.empty(len(order), np.int64)
    rank_N[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank_N, sizes[group_N]


def _check(config: SemanticIdsConfig, size: int, used: list[float], shared: float, largest: int) -> None:
    for level, share in enumerate(used):
        if share < config.min_used:
            raise ValueError(
                f"semantic_ids.min_used={config.min_used}: level {level} uses only {share:.3f} of its "
                f"{size} codes: lower codebook_size or num_levels, use method='kmeans', or "
                "lower min_used (SemanticIdsConfig)"
            )
    if shared > config.max_shared:
        raise ValueError(
            f"semantic_ids.max_shared={config.max_shared}: {shared:.3f} of the items share their codes, at "
            f"most {largest} the same ones: raise codebook_size or num_levels, use content that "
            "distinguishes items better, or raise max_shared (SemanticIdsConfig)"
        )
    if largest > size:
        raise ValueError(
            f"semantic_ids.codebook_size={size}: {largest} items share the same codes, more "
            "than the last level can count: raise codebook_size or num_levels, or use content that "
            "distinguishes items better (SemanticIdsConfig)"
        )


def load_semantic_ids(
    config: SemanticIdsConfig, data: "DataConfig", dataset: "Dataset", workdir: Path, seed: int
) -> SemanticIds:
    """Returns the semantic ids of a run: those in its workdir, or new ones, which it saves there.

    Raises ValueError if saved ones were made from another config, log, split or content, or if there are
    checkpoints but no saved ones.
    """
    from rec_jax.data.content import content_digest, content_vectors

    path = Path(workdir) / _FILE
    if not path.exists() and (Path(workdir) / "checkpoints").exists():
        raise ValueError(
            f"{path} is missing, and the model in {workdir} cannot be used without it: restore it, or "
            "train in another workdir"
        )
    ids = "\n".join(str(name) for name in dataset.histories.item_ids)
    made_from = json.dumps(
        {
            "config": dataclasses.asdict(config),
            "seed": seed,
            "items": hashlib.sha256(ids.encode()).hexdigest(),
            "split": dataset.split.checksum,
            "content": content_digest(config.content, dataset),
        }
    )
    with processes.first_before_others():
        if not path.exists():
            vectors, text = content_vectors(config.content, config.content_dims, dataset, data.titles_ids)
            counts_V = dataset.split.train_item_counts(dataset.histories)
            semantic_ids = make_semantic_ids(vectors, config, counts_V, seed)
            partial = path.with_suffix(".partial.npz")
            np.savez(
                partial,
                codes=semantic_ids.codes_VQ,
                codebook_size=semantic_ids.codebook_size,
                report=f"{text}\n{semantic_ids.report}",
                made_from=made_from,
            )
            os.replace(partial, path)
    with np.load(path) as file:
        if str(file["made_from"]) != made_from:
            raise ValueError(
                f"{path} was made from {file['made_from']}, but this run needs {made_from}: use another "
                "workdir (SemanticIdsConfig)"
            )
        return SemanticIds(file["codes"], int(file["codebook_size"]), str(file["report"]))
