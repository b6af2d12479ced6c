"""eSASRec against its formulas in plain NumPy. What every model promises is in test_contracts.py."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from packed_rows import pack

from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.models.base import init_model
from rec_jax.models.esasrec import ESASRec, ESASRecConfig
from rec_jax.nn.parallel import partition

NUM_ITEMS, MAX_LEN = 20, 9
CONFIG = ESASRecConfig(width=8, ff_width=12, num_heads=2, dropout=0.0)


def make(**kwargs):
    config = dataclasses.replace(CONFIG, **kwargs)
    model, params = init_model(lambda rngs: ESASRec(config, NUM_ITEMS, MAX_LEN, rngs=rngs), seed=0)
    rng = np.random.default_rng(1)  # far from their start, so that every gate, scale and bias takes part
    return model, jax.tree.map(lambda x: np.asarray(x + 0.3 * rng.normal(size=x.shape), np.float32), params)


def reference(params, history):
    """f64[S, D], one head and one query at a time."""
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
        """Each pair (i, i + 2) of the four dims of a head as a complex number, turned by its position."""
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
    model, params = make(**kwargs)
    history = np.array([3, 7, 7, 1, 20])
    batch = pack([[history]], length=MAX_LEN)
    params_on_device = jax.tree.map(jax.numpy.asarray, params)
    x_SD = np.asarray(jax.jit(lambda batch: model.bind(params_on_device)(batch))(batch))[0, :5]
    np.testing.assert_allclose(x_SD, reference(params, history), rtol=2e-4, atol=2e-5)


def test_a_convolution_of_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="conv_width=-1 must be at least 0"):
        ESASRecConfig(conv_width=-1)


def test_channels_of_the_feed_forward_lie_over_the_mesh():
    model, _ = make()
    mesh = make_mesh(MeshConfig(data=2, model=4))
    specs = partition(model.abstract_params, model.dims, mesh, fully_sharded=False)
    ff = specs["blocks"][0]["ff"]
    assert ff["gate_up"]["kernel"] == P(None, None, "model") and ff["gate_up"]["bias"] == P(None, "model")
    assert ff["down"]["kernel"] == P("model", None) and ff["down"]["bias"] == P(None)


def test_the_order_of_its_norms_is_fixed():
    with pytest.raises(ValueError, match="norm='post' is not one of 'pre'"):
        from rec_jax.config import build

        build(ESASRecConfig, {"type": "esasrec", "norm": "post"})
