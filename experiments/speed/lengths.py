"""Histories for the training benchmark, with real or synthetic lengths."""

import os
import pathlib
import tempfile
from dataclasses import dataclass

import numpy as np

from rec_jax.data.datasets import DataConfig, load_dataset
from rec_jax.data.histories import Histories, Split, leave_one_out


@dataclass(frozen=True)
class Lengths:
    """A data set's path under $REC_JAX_DATA, and the log-normal distribution that replaces missing data.

    The log-normal is fitted to the real mean number of targets per user, cut to `max_len`, and therefore to
    the real fill of padded rows (0.54 and 0.115). Draws are rounded and clipped to [shortest, longest], which
    are real as well.
    """

    path: str
    format: str
    max_len: int
    num_users: int
    num_items: int
    shortest: int
    longest: int
    log_mean: float
    log_std: float


LENGTHS = {
    "ml1m": Lengths("ml-1m/ml-1m.txt", "sasrec", 200, 6040, 3416, 15, 2274, 4.53, 1.04),
    "beauty": Lengths("beauty/Beauty.txt", "sequences", 50, 22363, 12101, 2, 201, 1.41, 0.80),
}


def load_lengths(name: str) -> tuple[Histories, Split, str]:
    """Returns (histories, their leave-one-out split, "real" or "synthetic")."""
    lengths = LENGTHS[name]
    root = os.environ.get("REC_JAX_DATA")
    if root and (pathlib.Path(root) / lengths.path).exists():
        config = DataConfig(path=lengths.path, format=lengths.format, max_len=lengths.max_len)
        with tempfile.TemporaryDirectory() as directory:
            dataset = load_dataset(config, directory)
        return dataset.histories, dataset.split, "real"
    histories = synthetic_histories(lengths)
    return histories, leave_one_out(histories), "synthetic"


def synthetic_histories(lengths: Lengths, seed: int = 0) -> Histories:
    """Histories with log-normal lengths and Zipf-distributed items."""
    rng = np.random.default_rng(seed)
    targets = np.exp(rng.normal(lengths.log_mean, lengths.log_std, lengths.num_users))
    targets = np.clip(np.round(targets), lengths.shortest, lengths.longest).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(targets + 3)])  # plus the first input, validation and test items
    share = 1 / np.arange(1, lengths.num_items + 1)
    items = rng.choice(lengths.num_items, offsets[-1], p=share / share.sum()) + 1
    return Histories(
        items=items.astype(np.int32),
        times=None,
        offsets=offsets,
        user_ids=np.arange(lengths.num_users).astype(str),
        item_ids=np.array([""] + [str(i) for i in range(1, lengths.num_items + 1)]),
        titles={},
    )
