"""Histories given as lists, packed into rows and encoded."""

from functools import partial

import jax
import numpy as np

from rec_jax.data.batch import Batch

ROW_LEN = 12


def pack(rows, times=None, length=ROW_LEN):
    """Each row holds its histories in order, then padding. times: seconds of their events, like rows."""
    arrays = {
        name: np.zeros((len(rows), length), np.int32) for name in ("item", "time", "segment", "position")
    }
    for row, histories in enumerate(rows):
        for segment, (inside, history) in enumerate(zip(places(histories), histories, strict=True), 1):
            arrays["item"][row, inside] = history
            arrays["segment"][row, inside] = segment
            arrays["position"][row, inside] = np.arange(len(history))
            if times is not None:
                arrays["time"][row, inside] = times[row][segment - 1]
    events = {"item": arrays["item"]} | ({} if times is None else {"time": arrays["time"]})
    return Batch(events, segments=arrays["segment"], positions=arrays["position"])


def places(histories):
    ends = np.cumsum([len(history) for history in histories])
    return [slice(end - len(history), end) for end, history in zip(ends, histories, strict=True)]


@partial(jax.jit, static_argnums=0)
def _encode(model, params, batch, key_B):
    return model.bind(params)(batch, key_B)


def encode(model, params, rows, key_B=None):
    return np.asarray(_encode(model, params, pack(rows), key_B))
