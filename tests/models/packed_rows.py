"""Histories given as lists, packed into rows and encoded."""

from functools import partial

import jax
import numpy as np

ROW_LEN = 12


def pack(rows):
    """Each row holds its histories in order, then padding."""
    batch = {name: np.zeros((len(rows), ROW_LEN), np.int32) for name in ("items", "segments", "positions")}
    for row, histories in enumerate(rows):
        for segment, (inside, history) in enumerate(zip(places(histories), histories, strict=True), 1):
            batch.events["item"][row, inside] = history
            batch.segments[row, inside] = segment
            batch.positions[row, inside] = np.arange(len(history))
    return batch


def places(histories):
    ends = np.cumsum([len(history) for history in histories])
    return [slice(end - len(history), end) for end, history in zip(ends, histories, strict=True)]


@partial(jax.jit, static_argnums=0)
def _encode(model, params, batch, key_B):
    return model.bind(params)(batch, key_B)


def encode(model, params, rows, key_B=None):
    return np.asarray(_encode(model, params, pack(rows), key_B))
