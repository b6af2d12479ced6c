"""LRURec against its formulas in plain NumPy, and the promises of packed rows."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import ROW_LEN, encode, pack, places

from rec_jax.config import build
from rec_jax.hashing import row_keys
from rec_jax.models.base import init_model
from rec_jax.models.lru import FIRST_DECAYS, LRUConfig
from rec_jax.models.registry import model_builder
from rec_jax.nn.dropout import dropout
from rec_jax.run_config import ExperimentConfig

NUM_ITEMS, WIDTH = 20, 6
ROWS = [[[3, 7, 7, 1], [20], [5, 6, 2, 9, 11]], [[8, 1, 4, 4, 15, 16, 17, 2]]]


@cache  # tests of one model share its compilation
def fresh(**kwargs):
    config = LRUConfig(**({"width": WIDTH, "ff_width": 9, "num_layers": 1, "dropout": 0.0} | kwargs))
    return config, *init_model(model_builder(config, NUM_ITEMS, ROW_LEN), seed=0)


@cache
def make(**kwargs):
    config, model, params = fresh(**kwargs)
    # Far from their start, so that scales, biases and the curves of the gates take part.
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.asarray(x + 0.3 * rng.normal(size=x.shape), np.float32), params)
    return config, model, params


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
    """One token at a time, f64[S, D]."""
    branch, x_SD = np.split(linear(x_SD, p["branches"]), 2, axis=-1)
    if "conv" in p:
        taps, convolved = p["conv"]["taps"], []
        for t in range(len(x_SD)):
            seen = range(min(len(taps), t + 1))
            convolved.append(sum(taps[back] * x_SD[t - back] for back in seen) + p["conv"]["bias"])
        x_SD = np.array(convolved)
    outs, h = [], None
    for t, x in enumerate(x_SD):
        r, i = np.split(sigmoid(linear(x, p["gates"])), 2)
        a = np.exp(-8 * np.log1p(np.exp(p["rate"])) * r)
        h = i * x if t == 0 else a * h + np.sqrt(1 - a**2) * i * x
        outs.append(h)
    return linear(gelu(branch) * np.array(outs), p["out"])


def reference(config, params, history, hidden=None, kept=None):
    """The encoding of every position of one history, f64[S, D].

    hidden: a list that gets the output of each layer. kept: what dropout multiplies the inputs with, and then
    both parts of each layer."""
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
        for inside, history in zip(places(histories), histories, strict=True):
            own = None if kept is None else [k[row, inside] for k in kept]
            expected = reference(config, params, history, kept=own)
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
def test_some_tokens_alone_and_the_hidden_states_of_every_layer(kwargs):
    config, model, params = make(**kwargs)
    query_positions = np.array([0, 1, 0]), np.array([3, 7, 9])

    @jax.jit
    def run(params, batch):
        hidden = []
        return model.bind(params)(batch, query_positions=query_positions, hidden=hidden), hidden

    x_QD, hidden = run(params, pack(ROWS))
    np.testing.assert_allclose(x_QD, encode(model, params, ROWS)[query_positions], rtol=1e-5, atol=1e-6)
    expected = []
    reference(config, params, ROWS[1][0], expected)
    assert len(hidden) == len(expected) == config.num_layers
    for x_BSD, wanted in zip(hidden[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(x_BSD[1, :8], wanted, rtol=2e-4, atol=2e-5)
    if hidden:
        np.testing.assert_allclose(hidden[-1][1], expected[-1][-1], rtol=2e-4, atol=2e-5)


def test_nothing_leaks_from_later_events_or_other_histories():
    _, model, params = make(num_layers=2)
    x_BSD = encode(model, params, ROWS)
    y_BSD = encode(model, params, [[[3, 7, 7, 8], [20], [5, 6, 2, 10, 4]], ROWS[1]])
    same = np.array([0, 1, 2, 4, 5, 6, 7])  # all before the events that changed
    np.testing.assert_array_equal(x_BSD[0, same], y_BSD[0, same])
    np.testing.assert_array_equal(x_BSD[1], y_BSD[1])
    assert np.all(np.any(x_BSD[0, [3, 8, 9]] != y_BSD[0, [3, 8, 9]], axis=1))


def test_dropout_of_the_inputs_and_both_parts_of_each_layer_by_key():
    config, model, params = make(num_layers=2, dropout=0.5)
    key_B, other_B = (row_keys(jnp.uint32(seed), jnp.arange(2)) for seed in (0, 1))
    ones = np.ones((2, ROW_LEN, WIDTH), np.float32)
    kept = jax.jit(lambda key_B: [dropout(ones, key_B, site, 0.5) for site in range(5)])(key_B)
    x_BSD = encode(model, params, ROWS, key_B)
    assert_equals_reference(x_BSD, config, params, kept)
    assert np.any(x_BSD != encode(model, params, ROWS, other_B))
    assert_equals_reference(encode(model, params, ROWS), config, params)


def test_decays_start_spread_evenly():
    _, _, params = fresh(num_layers=2)
    for block in params["blocks"].values():
        decay_D = np.exp(-8 * np.log1p(np.exp(np.asarray(block["recurrence"]["rate"], np.float64))))
        np.testing.assert_allclose(decay_D, np.linspace(*FIRST_DECAYS, WIDTH), rtol=1e-5)


def test_gradients_are_finite_where_gates_are_shut_or_open():
    """With r = 0 the root of 1 - a^2 is that of 0, which has no gradient."""
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
def test_mistakes_in_the_config(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LRUConfig(**kwargs)
