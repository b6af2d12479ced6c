"""LRURec against its formulas in plain NumPy, and properties of packed rows."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import ROW_LEN, encode, encode_queries, pack, random_params, segments

from rec_jax.config import build
from rec_jax.hashing import row_keys
from rec_jax.models.base import define_model, init_model
from rec_jax.models.lru import FIRST_DECAYS, LRUConfig
from rec_jax.models.registry import model_builder
from rec_jax.nn.dropout import dropout
from rec_jax.run_config import ExperimentConfig

NUM_ITEMS, WIDTH = 20, 6
ROWS = [[[3, 7, 7, 1], [20], [5, 6, 2, 9, 11]], [[8, 1, 4, 4, 15, 16, 17, 2]]]


def builder(**kwargs):
    config = LRUConfig(**({"width": WIDTH, "ff_width": 9, "num_layers": 1, "dropout": 0.5} | kwargs))
    return config, model_builder(config, NUM_ITEMS, ROW_LEN)


@cache  # tests of one model share its programs
def make(**kwargs):
    config, build = builder(**kwargs)
    model = define_model(build)
    return config, model, random_params(model)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def recurrence(x_SD, p):
    """Returns f64[S, D], computed for one token at a time."""
    branch, x_SD = np.split(linear(x_SD, p["branches"]), 2, axis=-1)
    if "conv" in p:
        taps, convolved = p["conv"]["taps"], []
        for t in range(len(x_SD)):
            lags = range(min(len(taps), t + 1))
            convolved.append(sum(taps[lag] * x_SD[t - lag] for lag in lags) + p["conv"]["bias"])
        x_SD = np.array(convolved)
    outs, h = [], None
    for t, x in enumerate(x_SD):
        r, i = np.split(sigmoid(linear(x, p["gates"])), 2)
        a = np.exp(-8 * np.log1p(np.exp(p["rate"])) * r)
        h = i * x if t == 0 else a * h + np.sqrt(1 - a**2) * i * x
        outs.append(h)
    return linear(gelu(branch) * np.array(outs), p["out"])


def reference(config, params, history, hidden=None, kept=None):
    """Returns f64[S, D], the query vector at every event of one history.

    hidden: a list to which the output of each layer is appended. kept: the factors by which dropout
    multiplies the inputs, then the two parts of each layer."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    kept = iter(kept or [1.0] * (2 * config.num_layers + 1))
    x = p["items"]["embedding"][history] * np.sqrt(WIDTH) * next(kept)
    for index in range(config.num_layers):
        block = p["blocks"][index]
        x = x + recurrence(norm(x, block["recurrence_norm"]), block["recurrence"]) * next(kept)
        y = gelu(linear(norm(x, block["ff_norm"]), block["ff"]["up"]))
        x = x + linear(y, block["ff"]["down"]) * next(kept)
        if hidden is not None:
            hidden.append(x)
    x = norm(x, p["final_norm"])
    if config.l2_normalize:
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x / config.temperature


def assert_equals_reference(x_BSD, config, params, kept=None):
    for row, histories in enumerate(ROWS):
        for inside, history in zip(segments(histories), histories, strict=True):
            factors = None if kept is None else [x[row, inside] for x in kept]
            expected = reference(config, params, history, kept=factors)
            np.testing.assert_allclose(x_BSD[row, inside], expected, rtol=2e-4, atol=2e-5)


VARIANTS = [
    {"num_layers": 2},
    {"conv_width": 0, "l2_normalize": True, "temperature": 0.2},
    {"num_layers": 0},
]


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_packed_rows_equal_the_reference_of_each_history(kwargs):
    config, model, params = make(**kwargs)
    x_BSD = encode(model, params, ROWS)
    assert x_BSD.shape == (2, ROW_LEN, WIDTH) and np.isfinite(x_BSD).all()
    assert_equals_reference(x_BSD, config, params)


@pytest.mark.parametrize("kwargs", [{"num_layers": 2}, {"num_layers": 0}], ids=str)
def test_query_positions_and_outputs_of_layers(kwargs):
    config, model, params = make(**kwargs)
    query_positions = np.array([0, 1, 0]), np.array([3, 7, 9])
    x_QD, hidden = encode_queries(model, params, pack(ROWS), query_positions)
    np.testing.assert_allclose(x_QD, encode(model, params, ROWS)[query_positions], rtol=1e-5, atol=1e-6)
    expected = []
    reference(config, params, ROWS[1][0], expected)
    assert len(hidden) == len(expected) == config.num_layers
    for x_BSD, expected_SD in zip(hidden[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(x_BSD[1, :8], expected_SD, rtol=2e-4, atol=2e-5)
    if hidden:
        np.testing.assert_allclose(hidden[-1][1], expected[-1][-1], rtol=2e-4, atol=2e-5)


def test_later_events_and_other_histories_are_not_used():
    _, model, params = make(num_layers=2)
    x_BSD = encode(model, params, ROWS)
    y_BSD = encode(model, params, [[[3, 7, 7, 8], [20], [5, 6, 2, 10, 4]], ROWS[1]])
    earlier, changed = [0, 1, 2, 4, 5, 6, 7], [3, 8, 9]
    np.testing.assert_array_equal(x_BSD[0, earlier], y_BSD[0, earlier])
    np.testing.assert_array_equal(x_BSD[1], y_BSD[1])
    assert np.all(np.any(x_BSD[0, changed] != y_BSD[0, changed], axis=1))


def test_dropout_is_applied_to_inputs_and_to_both_parts_of_a_layer():
    config, model, params = make()
    key_B, other_B = (row_keys(jnp.uint32(seed), jnp.arange(2)) for seed in (0, 1))
    ones = np.ones((2, ROW_LEN, WIDTH), np.float32)
    kept = jax.jit(lambda key_B: [dropout(ones, key_B, site, 0.5) for site in range(3)])(key_B)
    x_BSD = encode(model, params, ROWS, key_B)
    assert_equals_reference(x_BSD, config, params, kept)
    assert np.any(x_BSD != encode(model, params, ROWS, other_B))
    assert_equals_reference(encode(model, params, ROWS), config, params)


def test_initial_decays_are_evenly_spaced():
    _, build = builder()
    rate_D = init_model(build, seed=0)[1]["blocks"][0]["recurrence"]["rate"]
    decay_D = np.exp(-8 * np.log1p(np.exp(np.asarray(rate_D, np.float64))))
    np.testing.assert_allclose(decay_D, np.linspace(*FIRST_DECAYS, WIDTH), rtol=1e-5)


def test_gradients_are_finite_if_gates_are_closed_or_open():
    """With r = 0, 1 - a^2 is 0, and its square root has no gradient."""
    _, model, params = make()
    params = jax.tree.map(np.copy, params)
    params["blocks"][0]["recurrence"]["gates"]["bias"][:WIDTH] = [-200, -200, -20, 0, 20, 200]
    batch = pack(ROWS)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.cos(model.bind(params)(batch)))

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient(params)))


def test_a_config_names_the_model():
    config = build(ExperimentConfig, {"model": {"type": "lru", "conv_width": 3}})
    assert config.model == LRUConfig(conv_width=3)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"ff_width": 0}, "ff_width=0 must be at least 1 .LRUConfig"),
        ({"conv_width": -1}, "conv_width=-1"),
        ({"width": 0}, "width=0"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_invalid_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LRUConfig(**kwargs)
