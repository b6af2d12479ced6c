"""HSTU against its formulas in plain NumPy, and properties of packed rows."""

from dataclasses import make_dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import packed_rows
import pytest
from packed_rows import encode_batch, encode_queries, random_params

from rec_jax.config import build
from rec_jax.hashing import row_keys
from rec_jax.models.base import define_model
from rec_jax.models.hstu import HSTU, HSTUConfig
from rec_jax.models.registry import ModelConfig, model_builder
from rec_jax.nn.attention import QUERY_BLOCK

NUM_ITEMS, MAX_LEN = 20, 12


@cache  # tests of one model share its programs
def make(max_len=MAX_LEN, **kwargs):
    config = HSTUConfig(**({"width": 8, "num_heads": 2, "value_width": 3, "dropout": 0.0} | kwargs))
    model = define_model(lambda rngs: HSTU(config, NUM_ITEMS, max_len, rngs=rngs))
    return config, model, random_params(model, std=0.5)


def encode(model, params, batch, key_B=None):
    """Returns x_SD of one packed row."""
    return encode_batch(model, params, batch, key_B)[0]


def reference(config, params, items, times, hidden=None):
    """Returns f64[S, D], the query vector at every event of one history, computed for one head and one query
    at a time.

    hidden: a list to which the output of each layer is appended."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    head_width = config.head_width or config.width // config.num_heads
    inner, keys_width = config.num_heads * (config.value_width or head_width), config.num_heads * head_width

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    x = p["items"]["embedding"][items] * np.sqrt(config.width) + p["positions"]["embedding"][: len(items)]
    for index in range(config.num_layers):
        block = p["blocks"][index]
        parts = silu(norm(x, block["norm"]) @ block["uvqk"]["kernel"])
        u, v, q, k = np.split(parts, [inner, 2 * inner, 2 * inner + keys_width], axis=-1)
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
    """Returns histories of these lengths, [(items, seconds since the first event)], with gaps from seconds to
    weeks."""
    rng = np.random.default_rng(seed)
    histories = []
    for length in lengths:
        gaps = np.exp(rng.uniform(0, 14, length)).astype(np.int64)
        histories.append((rng.integers(1, NUM_ITEMS + 1, length), np.cumsum(gaps) - gaps[0]))
    return histories


def pack(histories, length=MAX_LEN, with_times=True):
    """Returns a batch of one row with all histories, in order."""
    items, times = zip(*histories, strict=True)
    return packed_rows.pack([items], [times] if with_times else None, length)


HISTORIES = draw([4, 1, 5])


def references(config, params, histories=HISTORIES):
    return np.concatenate([reference(config, params, *history) for history in histories])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_layers": 2},
        {"num_layers": 1, "time_bias": False, "value_width": 0},
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
        ([3, 80, 40], 3 * QUERY_BLOCK),  # a segment in three blocks, one that starts inside a block, padding
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
def test_query_positions_and_outputs_of_layers(num_layers):
    config, model, params = make(num_layers=num_layers)
    columns = np.array([3, 9])  # the last events of the first history and of the third
    x_QD, hidden = encode_queries(model, params, pack(HISTORIES), (np.zeros(2, int), columns))
    expected = encode(model, params, pack(HISTORIES))[columns]
    np.testing.assert_allclose(x_QD, expected, rtol=1e-5, atol=1e-6)
    expected = []
    reference(config, params, *HISTORIES[2], expected)
    assert len(hidden) == len(expected) == num_layers
    if num_layers:
        np.testing.assert_allclose(hidden[0][0, 5:10], expected[0], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(hidden[1][1], expected[1][-1], rtol=2e-4, atol=2e-5)


def test_later_events_are_not_used():
    """Earlier outputs do not change if later items or times change, or if a history gets longer."""
    _, model, params = make(num_layers=2)
    x_SD = encode(model, params, pack(HISTORIES))
    for name in ("item", "time"):
        batch = pack(HISTORIES)
        batch.events[name][0, [3, 8, 9]] += np.array([1, 3, 7]) * (1 if name == "item" else 10**6)
        batch.events["item"] = (batch.events["item"] - 1) % NUM_ITEMS + 1
        y_SD = encode(model, params, batch)
        earlier, changed = [0, 1, 2, 4, 5, 6, 7], [3, 8, 9]
        np.testing.assert_array_equal(x_SD[earlier], y_SD[earlier])
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
        # Only entries for distances and times that occur have gradients; no history is longer than 5.
        assert not block["position_bias"][5:].any()
        assert block["position_bias"][:5].all() and np.count_nonzero(block["time_bias"]) > 3


def test_the_input_and_each_layer_have_separate_dropout():
    _, model, params = make(width=6, dropout=0.5)
    silent = jax.tree.map(np.zeros_like, params)
    silent["items"]["embedding"] += 6**-0.5  # an input of ones
    for block in silent["blocks"].values():  # each block adds norm(attention) * U = 1 * SiLU(1)
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
    added = 2 / (1 + np.exp(-1))  # 2 * SiLU(1), unless dropped
    np.testing.assert_allclose(np.unique(np.round(one, 4)), [0, added, 2, 2 + added], rtol=1e-4)
    np.testing.assert_allclose(np.unique(np.round(two - one, 4)), [0, added], rtol=1e-4)
    assert np.any((two - one > 1) != np.isclose(one % 2, added))


def test_a_config_names_the_model_and_its_parameters():
    holder = make_dataclass("Holder", [("model", ModelConfig)])
    fields = {"type": "hstu", "width": 6, "num_heads": 3, "num_layers": 1}
    config = build(holder, {"model": fields}).model
    assert config == HSTUConfig(width=6, num_heads=3, num_layers=1)
    model = define_model(model_builder(config, 10, 7))
    assert jax.tree.map(np.shape, model.abstract_params) == {
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
def test_invalid_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HSTUConfig(**kwargs)
