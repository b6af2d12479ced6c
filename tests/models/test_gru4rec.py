"""GRU4Rec against its formulas in plain NumPy, and properties of packed rows."""

from functools import cache

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import ROW_LEN, encode, encode_queries, pack, random_params, segments

from rec_jax.compress.quant import QuantConfig, dequantize_params, quantize_params
from rec_jax.config import build
from rec_jax.hashing import row_keys
from rec_jax.models.base import define_model
from rec_jax.models.gru4rec import GRU, GRU4RecConfig
from rec_jax.models.registry import model_builder
from rec_jax.nn.context import Context
from rec_jax.nn.dropout import dropout
from rec_jax.run_config import ExperimentConfig

NUM_ITEMS = 20
ROWS = [[[3, 7, 7, 1], [20], [5, 6, 2, 9, 11]], [[8, 1, 4, 4, 15, 16, 17, 2]]]


@cache  # tests of one model share its programs
def make(**kwargs):
    config = GRU4RecConfig(**({"width": 6, "dropout": 0.5} | kwargs))
    model = define_model(model_builder(config, NUM_ITEMS, ROW_LEN))
    return config, model, random_params(model, std=0.6)


def reference(config, params, history, hidden=None, kept=None):
    """Returns f64[S, D], the query vector at every event of one history, computed for one token at a time.

    hidden: a list to which the output of each layer is appended. kept: the factors by which dropout
    multiplies the inputs of each layer."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    x = p["items"]["embedding"][history] * np.sqrt(config.width)
    for index in range(config.num_layers):
        layer = p["layers"][index]
        if kept is not None:
            x = x * kept[index]
        h, outs = np.zeros(config.hidden_width or config.width), []
        for token in x:
            xz, xr, xn = np.split(token @ layer["inputs"]["kernel"] + layer["inputs"]["bias"], 3)
            uz, ur, un = np.split(layer["state"]["kernel"], 3, axis=1)
            z, r = sigmoid(xz + h @ uz), sigmoid(xr + h @ ur)
            h = (1 - z) * h + z * np.tanh(xn + r * (h @ un))
            outs.append(h)
        x = np.array(outs)
        if hidden is not None:
            hidden.append(x)
    if "project" in p:
        x = x @ p["project"]["kernel"] + p["project"]["bias"]
    if config.l2_normalize:
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x / config.temperature


def assert_equals_reference(x_BSD, config, params, kept=None):
    for row, histories in enumerate(ROWS):
        for inside, history in zip(segments(histories), histories, strict=True):
            factors = None if kept is None else [x[row, inside] for x in kept]
            expected = reference(config, params, history, kept=factors)
            np.testing.assert_allclose(x_BSD[row, inside], expected, rtol=1e-4, atol=1e-5)


VARIANTS = [
    {"num_layers": 2},
    {"num_layers": 2, "hidden_width": 4},
    {"hidden_width": 9, "l2_normalize": True, "temperature": 0.2},
]


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_packed_rows_equal_the_reference_of_each_history(kwargs):
    config, model, params = make(**kwargs)
    assert ("project" in params) == ("hidden_width" in kwargs)
    x_BSD = encode(model, params, ROWS)
    assert x_BSD.shape == (2, ROW_LEN, config.table_dim) and np.isfinite(x_BSD).all()
    assert_equals_reference(x_BSD, config, params)


@pytest.mark.parametrize("kwargs", VARIANTS[1:], ids=str)
def test_query_positions_and_outputs_of_layers(kwargs):
    config, model, params = make(**kwargs)
    query_positions = np.array([0, 1, 0]), np.array([3, 7, 9])
    x_QD, hidden = encode_queries(model, params, pack(ROWS), query_positions)
    np.testing.assert_allclose(x_QD, encode(model, params, ROWS)[query_positions], rtol=1e-5, atol=1e-6)
    expected = []
    reference(config, params, ROWS[1][0], expected)
    assert len(hidden) == len(expected) == config.num_layers
    for x_BSH, expected_SH in zip(hidden[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(x_BSH[1, :8], expected_SH, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hidden[-1][1], expected[-1][-1], rtol=1e-4, atol=1e-5)


def test_later_events_and_other_histories_are_not_used():
    _, model, params = make(num_layers=2)
    x_BSD = encode(model, params, ROWS)
    y_BSD = encode(model, params, [[[3, 7, 7, 8], [20], [5, 6, 2, 10, 4]], ROWS[1]])
    earlier, changed = [0, 1, 2, 4, 5, 6, 7], [3, 8, 9]
    np.testing.assert_array_equal(x_BSD[0, earlier], y_BSD[0, earlier])
    np.testing.assert_array_equal(x_BSD[1], y_BSD[1])
    assert np.all(np.any(x_BSD[0, changed] != y_BSD[0, changed], axis=1))


def test_dropout_is_applied_to_the_inputs_of_each_layer():
    config, model, params = make(num_layers=2, hidden_width=4)
    key_B, other_B = (row_keys(jnp.uint32(seed), jnp.arange(2)) for seed in (0, 1))
    ones = [np.ones((2, ROW_LEN, width), np.float32) for width in (6, 4)]
    kept = jax.jit(lambda key_B: [dropout(x, key_B, site, 0.5) for site, x in enumerate(ones)])(key_B)
    x_BSD = encode(model, params, ROWS, key_B)
    assert_equals_reference(x_BSD, config, params, kept)
    assert np.any(x_BSD != encode(model, params, ROWS, other_B))
    assert_equals_reference(encode(model, params, ROWS), config, params)


def test_a_slowly_changing_state_is_kept_in_f32():
    """With z = sigmoid(-5) and candidates of 1, the state is 1 - (1 - z)^t; in bf16 it would stop near
    0.7."""
    length, z = 600, 1 / (1 + np.exp(5))
    layer = GRU(1, 1, 0.0, ("width", "hidden"), rngs=nnx.Rngs(0))
    layer.inputs.kernel = layer.state.kernel = nnx.Param(jnp.zeros((1, 3), jnp.bfloat16))
    layer.inputs.bias = nnx.Param(jnp.array([-5, 0, 20], jnp.bfloat16))
    h_BSH, _ = layer(jnp.zeros((1, length, 1), jnp.bfloat16), Context(np.arange(length)[None]))
    assert h_BSH.dtype == jnp.bfloat16
    expected = 1 - (1 - z) ** np.arange(1, length + 1)
    np.testing.assert_allclose(h_BSH[0, :, 0].astype(jnp.float32), expected, rtol=2**-8)


def test_quantized_kernels_work_inside_the_loop_over_tokens():
    _, model, params = make(num_layers=2, hidden_width=4)
    quantized = quantize_params(params, QuantConfig(names=".*kernel"))
    dequantized = dequantize_params(quantized)
    assert np.any(dequantized["layers"][0]["state"]["kernel"] != params["layers"][0]["state"]["kernel"])
    expected = encode(model, dequantized, ROWS)
    np.testing.assert_allclose(encode(model, quantized, ROWS), expected, rtol=1e-4, atol=1e-5)


def test_a_config_names_the_model():
    config = build(ExperimentConfig, {"model": {"type": "gru4rec", "hidden_width": 3}})
    assert config.model == GRU4RecConfig(hidden_width=3)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_layers": 0}, "num_layers=0 must be at least 1 .GRU4RecConfig"),
        ({"hidden_width": -1}, "hidden_width=-1"),
        ({"width": 0}, "width=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_invalid_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GRU4RecConfig(**kwargs)
