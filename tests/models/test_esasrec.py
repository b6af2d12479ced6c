"""eSASRec against its formulas in plain NumPy. test_contracts.py has the tests that are common to all
models."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from packed_rows import encode, random_params

from rec_jax.config import build
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.models.base import define_model
from rec_jax.models.esasrec import ESASRec, ESASRecConfig
from rec_jax.nn.parallel import partition

NUM_ITEMS, MAX_LEN = 20, 12
CONFIG = ESASRecConfig(width=8, ff_width=12, num_heads=2, dropout=0.0)


def make(**kwargs):
    config = dataclasses.replace(CONFIG, **kwargs)
    return define_model(lambda rngs: ESASRec(config, NUM_ITEMS, MAX_LEN, rngs=rngs))


def reference(params, history):
    """Returns f64[S, D], the query vectors, computed for one head and one query at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def linear(x, p):
        return np.tensordot(x, p["kernel"], 1) + p["bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def conv(x, p):
        earlier = [np.pad(x, ((back, 0), (0, 0)))[: len(x)] for back in range(len(p["taps"]))]
        return sum(y * taps for y, taps in zip(earlier, p["taps"], strict=True)) + p["bias"]

    def rotate(x):
        """Rotates each pair (i, i + 2) of the four dims of a head, as a complex number, by an angle that is
        proportional to its position."""
        angle = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(2) / 2)
        turned = (x[:, :2] + 1j * x[:, 2:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=1)

    def attention(x, p):
        q, kv = linear(x, p["query"]), linear(x, p["key_value"])
        if "positions" not in params:
            for head in (slice(0, 4), slice(4, 8)):
                q[:, head], kv[:, 0, head] = rotate(q[:, head]), rotate(kv[:, 0, head])
        out = np.zeros_like(q)
        for head in (slice(0, 4), slice(4, 8)):
            for s in range(len(x)):
                logits = kv[: s + 1, 0, head] @ q[s, head] / 2
                weights = np.exp(logits - logits.max())
                out[s, head] = weights / weights.sum() @ kv[: s + 1, 1, head]
        return linear(out, p["out"])

    def swiglu(x, p):
        both = linear(x, p["gate_up"])
        gate, up = both[:, 0], both[:, 1]
        return linear(gate * sigmoid(gate) * up, p["down"])

    x = p["items"]["embedding"][history] * np.sqrt(8)
    if "positions" in p:
        x = x + p["positions"]["embedding"][: len(history)]
    for block in p["blocks"].values():
        gate = sigmoid(linear(x, block["attention_gate"]))
        normed = norm(x, block["attention_norm"])
        if "conv" in block:
            normed = normed + conv(normed, block["conv"])
        x = x + gate * attention(normed, block["attention"])
        x = x + sigmoid(linear(x, block["ff_gate"])) * swiglu(norm(x, block["ff_norm"]), block["ff"])
    return norm(x, p["final_norm"])


@pytest.mark.parametrize("kwargs", [{}, {"position": "learned", "conv_width": 0}], ids=str)
def test_equals_the_reference(kwargs):
    model, history = make(**kwargs), np.array([3, 7, 7, 1, 20])
    params = random_params(model)
    x_SD = encode(model, params, [[history]])[0, :5]
    np.testing.assert_allclose(x_SD, reference(params, history), rtol=2e-4, atol=2e-5)


def test_a_negative_conv_width_is_refused():
    with pytest.raises(ValueError, match="conv_width=-1 must be at least 0"):
        ESASRecConfig(conv_width=-1)


def test_channels_of_the_feed_forward_are_sharded():
    model = make()
    mesh = make_mesh(MeshConfig(data=2, model=4))
    specs = partition(model.abstract_params, model.dims, mesh, fully_sharded=False)
    ff = specs["blocks"][0]["ff"]
    assert ff["gate_up"]["kernel"] == P(None, None, "model") and ff["gate_up"]["bias"] == P(None, "model")
    assert ff["down"]["kernel"] == P("model", None) and ff["down"]["bias"] == P(None)


def test_only_norm_pre_is_accepted():
    with pytest.raises(ValueError, match="norm='post' is not one of 'pre'"):
        build(ESASRecConfig, {"type": "esasrec", "norm": "post"})
