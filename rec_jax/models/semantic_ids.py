"""Semantic ids: every item as a path of codes, made once a run from what the item is."""

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

if TYPE_CHECKING:  # slow to import, and needed to make codes only
    from rec_jax.data.datasets import DataConfig, Dataset

_FILE = "semantic_ids.npz"


@dataclass(frozen=True)
class SemanticIdsConfig:
    """How items become codes, for models that generate them; no other model reads this.

    content: see `data.content.content_vectors`. Items that share all codes are told apart by one more, last
    level, which counts them, the most frequent in training first.
    """

    content: str = ""
    content_dims: int = 512  # that words and attributes are hashed to
    method: Literal["rqvae", "kmeans"] = "rqvae"
    num_levels: int = 3  # before the one that counts
    codebook_size: int = 256  # of each level
    epochs: int = 60  # rqvae
    width: int = 256  # rqvae: hidden units of encoder and decoder
    latent: int = 32  # rqvae: dims that are quantised
    min_used: float = 0.5  # an error, if fewer of a level's codes stand for an item
    max_shared: float = 0.5  # an error, if more of the items share their codes before the last level

    def __post_init__(self):
        for name in ("content_dims", "num_levels", "epochs", "width", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 (SemanticIdsConfig)")
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size={self.codebook_size} must be at least 2 (SemanticIdsConfig)")
        for name in ("min_used", "max_shared"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1] (SemanticIdsConfig)")


class SemanticIds:
    """The codes of a catalogue, and their trie; a constant of a module, compared by value.

    codes_VQ: int32[V + 1, Q] of 0..codebook_size - 1, no two items alike; row 0 is padding and is not read.
    report: a line about them.
    """

    def __init__(self, codes_VQ: np.ndarray, codebook_size: int, report: str = ""):
        self.codes_VQ, self.codebook_size = np.ascontiguousarray(codes_VQ, np.int32), codebook_size
        self.num_levels, self.report = codes_VQ.shape[1], report
        items = self.codes_VQ[1:]
        if items.min() < 0 or items.max() >= codebook_size or len(np.unique(items, axis=0)) < len(items):
            raise ValueError(
                f"items need codes in 0..{codebook_size - 1}, no two of them the same (SemanticIds)"
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
    """Which codes may follow which, in memory linear in the number of items.

    The nodes of a level are numbered in the order of their paths, so the children of a node are neighbours;
    level 0 has the root alone, level Q the items.

    first: of level q int32[nodes of q, and 1], the first child of each node, and behind the last one's.
    codes: of level q int32[nodes of level q + 1], the code that leads to each.
    most: of level q the most children that a node has.
    items: int32[nodes of Q], the item at the end of each path.
    paths_VQ: int32[V + 1, Q], the nodes on the way to each item; row 0, of padding, is 0.
    """

    def __init__(self, semantic_ids: SemanticIds):
        order = np.lexsort(semantic_ids.codes_VQ[1:].T[::-1])
        self.items = (order + 1).astype(np.int32)
        node_V = np.zeros(len(order), np.int64)
        self.first, self.codes, self.most = [], [], []
        self.paths_VQ = np.zeros_like(semantic_ids.codes_VQ)
        for level, code_V in enumerate(semantic_ids.codes_VQ[1:][order].T):
            keys, child_V = np.unique(node_V * semantic_ids.codebook_size + code_V, return_inverse=True)
            num_children = np.bincount(keys // semantic_ids.codebook_size)
            self.first.append(np.concatenate([[0], np.cumsum(num_children)]).astype(np.int32))
            self.codes.append((keys % semantic_ids.codebook_size).astype(np.int32))
            self.most.append(int(num_children.max()))
            self.paths_VQ[self.items, level] = node_V = child_V


def numbered_semantic_ids(num_items: int, config: SemanticIdsConfig) -> SemanticIds:
    """Codes that say nothing: the digits of the item's number. For plans and tests without data."""
    num_levels = 1
    while config.codebook_size**num_levels < num_items:
        num_levels += 1
    num_levels = max(num_levels, config.num_levels + 1)
    powers = config.codebook_size ** np.arange(num_levels - 1, -1, -1, dtype=np.int64)
    digits_VQ = np.arange(num_items)[:, None] // powers % config.codebook_size
    return SemanticIds(
        np.pad(digits_VQ, ((1, 0), (0, 0))), config.codebook_size, "codes are numbers of items"
    )


def make_semantic_ids(
    vectors_VF: np.ndarray, config: SemanticIdsConfig, counts_V: np.ndarray, seed: int
) -> SemanticIds:
    """vectors_VF: f32[V + 1, F] of the items, row 0 not read; counts_V: training events of each.

    Raises ValueError if codes lie idle or too many items share theirs.
    """
    from rec_jax.models.quantizers import residual_kmeans, rqvae

    x_NF, sizes = vectors_VF[1:], (config.num_levels, config.codebook_size)
    if config.method == "kmeans":
        codes_NQ = residual_kmeans(x_NF, *sizes, seed)[0]
    else:
        codes_NQ = rqvae(x_NF, *sizes, seed, epochs=config.epochs, width=config.width, latent=config.latent)
    used = [len(np.unique(codes_N)) / config.codebook_size for codes_N in codes_NQ.T]
    place_N, group_N = count_within(codes_NQ, counts_V[1:])
    shared, largest = float(np.mean(group_N > 1)), int(group_N.max())
    _check(config, used, shared, largest)
    codes_NQ = np.column_stack([codes_NQ, place_N])
    report = (
        f"codes by {config.method}: used {', '.join(f'{x:.0%}' for x in used)} of {config.codebook_size} a "
        f"level; {shared:.1%} of the items share theirs, {largest} at most, and are counted by the last level"
    )
    return SemanticIds(np.pad(codes_NQ, ((1, 0), (0, 0))), config.codebook_size, report)


def count_within(codes_NQ: np.ndarray, counts_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place int[N] of each item among those that share its codes, how many these are int[N]).

    Places count from 0, the largest of `counts_N` first: the last code alone then tells the frequent from the
    rare. Source: TIGER, section 3.1, which leaves their order open.
    """
    group_N = np.unique(codes_NQ, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.lexsort((-counts_N, group_N))
    sizes = np.bincount(group_N)
    place_N = np.empty(len(order), np.int64)
    place_N[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place_N, sizes[group_N]


def _check(config: SemanticIdsConfig, used: list[float], shared: float, largest: int) -> None:
    for level, share in enumerate(used):
        if share < config.min_used:
            raise ValueError(
                f"semantic_ids.min_used={config.min_used}: of level {level} only {share:.3f} of the "
                f"{config.codebook_size} codes are used: lower codebook_size or num_levels, use method='kmeans', or "
                "lower min_used (SemanticIdsConfig)"
            )
    if shared > config.max_shared:
        raise ValueError(
            f"semantic_ids.max_shared={config.max_shared}: {shared:.3f} of the items share their codes, up to "
            f"{largest}: raise codebook_size or num_levels, give content that tells them apart, or raise "
            "max_shared (SemanticIdsConfig)"
        )
    if largest > config.codebook_size:
        raise ValueError(
            f"semantic_ids.codebook_size={config.codebook_size}: {largest} items share their codes, which the last level "
            "cannot count: raise codebook_size or num_levels, or give content that tells them apart (SemanticIdsConfig)"
        )


def load_semantic_ids(
    config: SemanticIdsConfig, data: "DataConfig", dataset: "Dataset", workdir: Path, seed: int
) -> SemanticIds:
    """The codes of a run, made unless they are in its workdir.

    Raises ValueError for codes that were made from another config, log, split or content, and where a trained
    model has lost its codes.
    """
    from rec_jax.data.content import content_digest, content_vectors

    path = Path(workdir) / _FILE
    if not path.exists() and (Path(workdir) / "checkpoints").exists():
        raise ValueError(
            f"{path} is missing, and the model in {workdir} can only be read with it: bring it back, or "
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
                report=f"{text}\n{semantic_ids.report}",
                made_from=made_from,
            )
            os.replace(partial, path)
    with np.load(path) as file:
        if str(file["made_from"]) != made_from:
            raise ValueError(
                f"{path} was made from {file['made_from']}, this run asks for {made_from}: use another "
                "workdir (SemanticIdsConfig)"
            )
        return SemanticIds(file["codes"], config.codebook_size, str(file["report"]))
