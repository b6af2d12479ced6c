"""HSTU against its formulas in plain NumPy, and the promises of packed rows."""

from dataclasses import make_dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import packed_rows
import pytest

from rec_jax.config import build
from rec_jax.hashing import row_keys
from rec_jax.models.base import define_model, init_model
from rec_jax.models.hstu import HSTU, HSTUConfig
from rec_jax.models.registry import ModelConfig, model_builder
from rec_jax.nn.attention import QUERY_BLOCK

NUM_ITEMS, MAX_LEN = 20, 12


@cache  # tests of one model share its compilation
def make(max_len=MAX_LEN, **kwargs):
    config = HSTUConfig(**({"width": 8, "num_heads": 2, "value_width": 3, "dropout": 0.0} | kwargs))
    model = define_model(lambda rngs: HSTU(config, NUM_ITEMS, max_len, rngs=rngs))
    # Far from their start, so that scales and biases take part.
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.5, x.shape)), model.abstract_params)
    return config, model, params


@partial(jax.jit, static_argnums=0)
def _encode(model, params, batch, key_B):
    return model.bind(params)(batch, key_B)


def encode(model, params, batch, key_B=None):
    """x_SD of one packed row."""
    return np.asarray(_encode(model, params, batch, key_B))[0]


def reference(config, params, items, times, hidden=None):
    """The encoding of every position of one history, f64[S, D], one head and one query at a time.

    hidden: a list that gets the output of each layer."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    keys_width = config.head_width or config.width // config.num_heads
    inner, of_keys = config.num_heads * (config.value_width or keys_width), config.num_heads * keys_width

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    x = p["items"]["embedding"][items] * np.sqrt(config.width) + p["positions"]["embedding"][: len(items)]
    for index in range(config.num_layers):
        block = p["blocks"][index]
        parts = silu(norm(x, block["norm"]) @ block["uvqk"]["kernel"])
        u, v, q, k = np.split(parts, [inner, 2 * inner, 2 * inner + of_keys], axis=-1)
        q, k, v = (np.split(part, config.num_heads, axis=-1) for part in (q, k, v))
        y = [np.zeros_like(part) for part in v]
        for head in range(config.num_heads):
            for s in range(len(x)):
                for t in range(s + 1):
                    logit = q[head][s] @ k[head][t] + block["position_bias"][s - t]
                    if config.time_bias:
                        bucket = int(np.log(max(1.0, times[s] - times[t])) / 0.301)
                        logit += block["time_bias"][min(bucket, config.num_time_buckets - 1)]
                    y[head][s] += silu(logit) * v[head][t] / (s + 1)
        y = norm(np.concatenate(y, -1), block["attention_norm"]) * u
        x = x + y @ block["out"]["kernel"] + block["out"]["bias"]
        if hidden is not None:
            hidden.append(x)
    if config.l2_normalize:
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x / config.temperature


def draw(lengths, seed=0):
    """Histories of these lengths: [(items, seconds since the first event)], gaps from seconds to weeks."""
    rng = np.random.default_rng(seed)
    histories = []
    for length in lengths:
        gaps = np.exp(rng.uniform(0, 14, length)).astype(np.int64)
        histories.append((rng.integers(1, NUM_ITEMS + 1, length), np.cumsum(gaps) - gaps[0]))
    return histories


def pack(histories, length=MAX_LEN, with_times=True):
    """All histories in one row, in order."""
    items, times = zip(*histories, strict=True)
    return packed_rows.pack([items], [times] if with_times else None, length)


HISTORIES = draw([4, 1, 5])


def references(config, params, histories=HISTORIES):
    return np.concatenate([reference(config, params, *history) for history in histories])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_layers": 1},
        {"num_layers": 2},
        {"num_layers": 3},
        {"num_layers": 2, "time_bias": False, "value_width": 0},
        {"num_layers": 1, "num_heads": 3, "head_width": 2, "num_time_buckets": 5, "temperature": 0.5},
        {"num_layers": 1, "value_width": 7, "l2_normalize": True},
        {"num_layers": 0},
    ],
    ids=str,
)
def test_packed_rows_equal_the_reference_of_each_history(kwargs):
    config, model, params = make(**kwargs)
    x_SD = encode(model, params, pack(HISTORIES, with_times=config.time_bias))
    expected = references(config, params)
    np.testing.assert_allclose(x_SD[: len(expected)], expected, rtol=2e-4, atol=2e-5)
    assert np.abs(expected).max() > 0.1
    assert bool(model.columns) == config.time_bias and model.is_causal


@pytest.mark.parametrize(
    "lengths, row",
    [
        ([QUERY_BLOCK - 1], QUERY_BLOCK - 1),
        ([QUERY_BLOCK], QUERY_BLOCK),
        ([QUERY_BLOCK + 1], QUERY_BLOCK + 1),
        ([3, 80, 40], 3 * QUERY_BLOCK),  # a segment over three blocks, one that begins inside, padding
    ],
    ids=str,
)
def test_rows_around_the_query_block_equal_the_reference(lengths, row):
    config, model, params = make(max_len=row, num_layers=1)
    histories = draw(lengths)
    x_SD = encode(model, params, pack(histories, row))
    expected = references(config, params, histories)
    np.testing.assert_allclose(x_SD[: len(expected)], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("num_layers", [0, 2])
def test_some_tokens_alone_and_the_hidden_states_of_every_layer(num_layers):
    config, model, params = make(num_layers=num_layers)
    query_positions = np.array([0, 0]), np.array([3, 9])  # the last of the first history and of the third

    @jax.jit
    def run(params, batch):
        hidden = []
        return model.bind(params)(batch, query_positions=query_positions, hidden=hidden), hidden

    x_QD, hidden = run(params, pack(HISTORIES))
    np.testing.assert_allclose(
        x_QD, encode(model, params, pack(HISTORIES))[query_positions[1]], rtol=1e-5, atol=1e-6
    )
    expected = []
    reference(config, params, *HISTORIES[2], expected)
    assert len(hidden) == len(expected) == num_layers
    if num_layers:
        np.testing.assert_allclose(hidden[0][0, 5:10], expected[0], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(hidden[1][1], expected[1][-1], rtol=2e-4, atol=2e-5)


def test_nothing_later_changes_anything_earlier():
    """Neither another item or another time, nor that a history goes on."""
    _, model, params = make()
    x_SD = encode(model, params, pack(HISTORIES))
    for name in ("item", "time"):
        batch = pack(HISTORIES)
        batch.events[name][0, [3, 8, 9]] += np.array([1, 3, 7]) * (1 if name == "item" else 10**6)
        batch.events["item"] = (batch.events["item"] - 1) % NUM_ITEMS + 1
        y_SD = encode(model, params, batch)
        same = np.array([0, 1, 2, 4, 5, 6, 7])  # all before the events that changed
        np.testing.assert_array_equal(x_SD[same], y_SD[same])
        changed = np.array([3, 8, 9])
        assert np.all(np.any(x_SD[changed] != y_SD[changed], axis=1))

    items, times = HISTORIES[2]
    longer = (np.append(items, [1, 2]), np.append(times, times[-1] + [5, 9]))
    y_SD = encode(model, params, pack([*HISTORIES[:2], longer]))
    np.testing.assert_array_equal(x_SD[:10], y_SD[:10])


def test_gradients_reach_every_parameter():
    _, model, params = make()

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        return jnp.sum(model.bind(params)(batch)[0, :10] ** 2)

    grads = gradient(params, pack(HISTORIES))
    assert all(np.isfinite(x).all() and np.any(x != 0) for x in jax.tree.leaves(grads))
    for block in grads["blocks"].values():
        assert not block["position_bias"][5:].any()  # no two events of a history are so far apart
        # What the biases do is pinned by the reference; here, which rows of the tables learn.
        assert block["position_bias"][:5].all() and np.count_nonzero(block["time_bias"]) > 3


def test_dropout_has_a_mask_for_the_input_and_one_for_each_layer():
    _, model, params = make(width=6, dropout=0.5)
    silent = jax.tree.map(np.zeros_like, params)
    silent["items"]["embedding"] += 6**-0.5  # an input of ones
    for block in silent["blocks"].values():  # each adds norm(attention) * U, which is 1 * SiLU(1)
        block["norm"]["bias"] += 1
        block["uvqk"]["kernel"][0] = 1
        block["attention_norm"]["bias"] += 1
        block["out"]["kernel"] += np.eye(6)

    @jax.jit
    def run(params, batch, key_B):
        hidden = []
        model.bind(params)(batch, key_B, hidden=hidden)
        return hidden

    one, two = run(silent, pack(draw([12])), row_keys(jnp.uint32(0), jnp.arange(1)))
    added = 2 / (1 + np.exp(-1))  # where it is kept
    np.testing.assert_allclose(np.unique(np.round(one, 4)), [0, added, 2, 2 + added], rtol=1e-4)
    np.testing.assert_allclose(np.unique(np.round(two - one, 4)), [0, added], rtol=1e-4)
    assert np.any((two - one > 1) != np.isclose(one % 2, added))


def test_dropout_changes_with_the_key_and_not_without_one():
    _, model, params = make(dropout=0.5)
    keys = [row_keys(jnp.uint32(seed), jnp.arange(1)) for seed in (0, 0, 1)]
    a, again, other = (encode(model, params, pack(HISTORIES), key) for key in keys)
    np.testing.assert_array_equal(a, again)
    assert np.any(a != other) and np.any(a != encode(model, params, pack(HISTORIES)))


def test_a_config_file_names_it_and_its_parameters():
    holder = make_dataclass("Holder", [("model", ModelConfig)])
    named = {"type": "hstu", "width": 6, "num_heads": 3, "num_layers": 1}
    config = build(holder, {"model": named}).model
    assert config == HSTUConfig(width=6, num_heads=3, num_layers=1)
    _, params = init_model(model_builder(config, 10, 7), seed=0)
    shapes = jax.tree.map(np.shape, params)
    assert shapes == {
        "items": {"embedding": (11, 6)},
        "positions": {"embedding": (7, 6)},
        "blocks": {
            0: {
                "norm": {"scale": (6,), "bias": (6,)},
                "uvqk": {"kernel": (6, 24)},
                "position_bias": (7,),
                "time_bias": (128,),
                "attention_norm": {"scale": (6,), "bias": (6,)},
                "out": {"kernel": (6, 6), "bias": (6,)},
            }
        },
    }


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_heads": 6, "width": 64}, "num_heads=6 does not divide width=64"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1 .HSTUConfig"),
        ({"head_width": -1}, "head_width=-1"),
        ({"value_width": -1}, "value_width=-1"),
        ({"num_time_buckets": 0}, "num_time_buckets=0"),
        ({"dropout": 1.0}, "dropout=1.0 .* .HSTUConfig"),
    ],
)
def test_mistakes_in_the_config(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HSTUConfig(**kwargs)
