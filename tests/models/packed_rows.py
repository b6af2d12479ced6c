"""Small batches and parameters for tests of models: histories given as lists are packed into rows and
encoded."""

from functools import partial

import jax
import numpy as np

from rec_jax.data.batch import Batch

ROW_LEN = 12


def pack(rows, times=None, length=ROW_LEN):
    """Returns a Batch. Each row holds its histories in order, then padding. times: seconds, nested like
    rows."""
    arrays = {
        name: np.zeros((len(rows), length), np.int32) for name in ("item", "time", "segment", "position")
    }
    for row, histories in enumerate(rows):
        for segment, (inside, history) in enumerate(zip(segments(histories), histories, strict=True), 1):
            arrays["item"][row, inside] = history
            arrays["segment"][row, inside] = segment
            arrays["position"][row, inside] = np.arange(len(history))
            if times is not None:
                arrays["time"][row, inside] = times[row][segment - 1]
    events = {"item": arrays["item"]} | ({} if times is None else {"time": arrays["time"]})
    return Batch(events, segments=arrays["segment"], positions=arrays["position"])


def segments(histories):
    """The slice of each history in its packed row."""
    ends = np.cumsum([len(history) for history in histories])
    return [slice(end - len(history), end) for end, history in zip(ends, histories, strict=True)]


def random_params(model, std=0.3):
    """Returns random parameters, without a program that initialises them. They are far from initial values,
    so that tests notice every scale, bias and gate."""
    rng = np.random.default_rng(1)
    means = {"scale": 1.0, "rate": -4.0}  # of norms; of the decays of LRURec

    def draw(path, x):
        return np.float32(means.get(path[-1].key, 0.0) + rng.normal(0, std, x.shape))

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params)


@partial(jax.jit, static_argnums=0)
def _encode(model, params, batch, key_B):
    return model.bind(params)(batch, key_B)


def encode_batch(model, params, batch, key_B=None):
    """Returns x_BSD as a NumPy array."""
    return np.asarray(_encode(model, params, batch, key_B))


def encode(model, params, rows, key_B=None):
    """Returns x_BSD of histories packed into rows."""
    return encode_batch(model, params, pack(rows), key_B)


@partial(jax.jit, static_argnums=0)
def encode_queries(model, params, batch, query_positions):
    """Returns (x_QD at `query_positions`, the output of each layer)."""
    hidden = []
    return model.bind(params)(batch, query_positions=query_positions, hidden=hidden), hidden
