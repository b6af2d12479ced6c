"""A small SASRec to quantize, for the tests of quantization."""

from functools import cache

import jax
import numpy as np

from rec_jax.compress.quant import observe_inputs, quantize_params
from rec_jax.data.batch import Batch
from rec_jax.models.base import define_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.tree import leaf_names

F32 = np.float32
ALL = r".*(kernel|embedding)"


@cache
def sasrec():
    """Returns (model, params, batch): random parameters; packed rows with padding."""
    config = SASRecConfig(width=16, num_layers=1, ff_width=24, num_heads=2, dropout=0.0)
    model = define_model(lambda rngs: SASRec(config, 20, 12, rngs=rngs))
    rng = np.random.default_rng(1)
    values = {
        name: (0.35 * rng.normal(size=x.shape) + name.endswith("scale")).astype(F32)
        for name, x in leaf_names(model.abstract_params).items()
    }
    params = jax.tree.unflatten(jax.tree.structure(model.abstract_params), list(values.values()))
    segments = np.where(np.arange(12) < 9, 1 + (np.arange(12) > 4), 0) * np.ones((3, 1), np.int32)
    positions = np.where(np.arange(12) > 4, np.arange(12) - 5, np.arange(12)) * (segments > 0)
    items = rng.integers(1, 21, (3, 12)) * (segments > 0)
    batch = Batch({"item": items}, segments, positions)
    return model, params, jax.tree.map(lambda x: np.asarray(x, np.int32), batch)


@cache
def samples():
    model, params, batch = sasrec()
    return observe_inputs(model, params, [batch, batch])


@cache
def quantized_sasrec(config):
    return quantize_params(sasrec()[1], config, samples())


@jax.jit
def _encode(params):
    model, _, batch = sasrec()
    return model.bind(params)(batch)


def encode(params):
    """Outputs of the model at the real tokens."""
    return np.asarray(_encode(params))[sasrec()[2].segments > 0]


def relative_error(x, expected):
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)
