"""SASRec against its formulas in plain NumPy, and the promises of packed rows."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.hashing import row_keys
from rec_jax.models.base import init_model
from rec_jax.models.sasrec import SASRec, SASRecConfig

NUM_ITEMS, MAX_LEN = 20, 12


@cache  # tests of one model share its compilation
def make(**kwargs):
    config = SASRecConfig(**({"width": 8, "ff_width": 12, "num_heads": 2, "dropout": 0.0} | kwargs))
    model, params = init_model(lambda rngs: SASRec(config, NUM_ITEMS, MAX_LEN, rngs=rngs), seed=0)
    # Far from their start, so that scales, biases and the logits of the attention take part.
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.asarray(x + 0.3 * rng.normal(size=x.shape), np.float32), params)
    return config, model, params


def encode(model, params, histories, key_B=None):
    """x_SD of one packed row."""
    return np.asarray(_encode(model, params, pack(histories, MAX_LEN), key_B))[0]


@partial(jax.jit, static_argnums=0)
def _encode(model, params, batch, key_B):
    return model.bind(params)(batch, key_B)


def reference(config, params, history):
    """The encoding of every position of one history, f64[S, D], one head and one query at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    def rotate(x, position):
        half = len(x) // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * 10_000.0 ** (-i / half)
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    def attention(x, memory, p):
        q = linear(x, p["query"])
        k, v = np.moveaxis(np.tensordot(memory, p["key_value"]["kernel"], 1) + p["key_value"]["bias"], 1, 0)
        width = config.width // config.num_heads
        out = np.zeros_like(q)
        for head in range(config.num_heads):
            part = slice(head * width, (head + 1) * width)
            for s in range(len(x)):
                logits = []
                for t in range(s + 1):
                    a, b = q[s, part], k[t, part]
                    if config.position == "rotary":
                        a, b = rotate(a, s), rotate(b, t)
                    logits.append(a @ b / np.sqrt(width))
                weights = np.exp(logits - np.max(logits))
                out[s, part] = (weights / weights.sum()) @ v[: s + 1, part]
        return linear(out, p["out"])

    x = p["items"]["embedding"][history] * np.sqrt(config.width)
    if config.position == "learned":
        x = x + p["positions"]["embedding"][: len(history)]
    for index in range(config.num_layers):
        block = p["blocks"][index]
        y = norm(x, block["attention_norm"])
        residual = x if config.norm == "pre" else y
        memory = x if config.norm == "original" else y
        x = residual + attention(y, memory, block["attention"])
        y = norm(x, block["ff_norm"])
        residual = x if config.norm == "pre" else y
        x = residual + linear(np.maximum(linear(y, block["ff"]["up"]), 0), block["ff"]["down"])
    x = norm(x, p["final_norm"])
    if config.l2_normalize:
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x / config.temperature


def pack(histories, length):
    """All histories in one row, in order."""
    batch = {name: np.zeros((1, length), np.int32) for name in ("items", "segments", "positions")}
    at = 0
    for segment, history in enumerate(histories, 1):
        inside = slice(at, at + len(history))
        batch["items"][0, inside] = history
        batch["segments"][0, inside] = segment
        batch["positions"][0, inside] = np.arange(len(history))
        at += len(history)
    return batch


HISTORIES = [[3, 7, 7, 1], [20], [5, 6, 2, 9, 11]]


@pytest.mark.parametrize("norm", ["pre", "post", "original"])
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_packed_rows_equal_the_reference_of_each_history(norm, position):
    config, model, params = make(norm=norm, position=position)
    x_SD = encode(model, params, HISTORIES)
    expected = np.concatenate([reference(config, params, history) for history in HISTORIES])
    np.testing.assert_allclose(x_SD[: len(expected)], expected, rtol=2e-4, atol=2e-5)


def test_normalised_scoring_is_the_cosine_over_the_temperature():
    config, model, params = make(l2_normalize=True, temperature=0.05)
    x_SD = encode(model, params, HISTORIES)
    expected = np.concatenate([reference(config, params, history) for history in HISTORIES])
    table = np.asarray(params["items"]["embedding"], np.float64)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    scores = x_SD @ model.bind(params).item_vectors().T
    np.testing.assert_allclose(scores[: len(expected)], expected @ table.T, rtol=1e-3, atol=1e-3)
    assert np.abs(scores).max() <= 20 * (1 + 1e-5)


@pytest.mark.parametrize("norm, position", [("post", "learned"), ("original", "rotary")])
def test_nothing_leaks_from_later_events_or_other_histories(norm, position):
    _, model, params = make(norm=norm, position=position)
    x_SD = encode(model, params, HISTORIES)
    changed = [[3, 7, 7, 8], [20], [5, 6, 2, 10, 4]]
    y_SD = encode(model, params, changed)
    same = np.array([0, 1, 2, 4, 5, 6, 7])  # all before the events that changed
    np.testing.assert_array_equal(x_SD[same], y_SD[same])
    changes = np.array([3, 8, 9])
    assert np.all(np.any(x_SD[changes] != y_SD[changes], axis=1))


def test_dropout_changes_with_the_key_and_not_without_one():
    _, model, params = make(dropout=0.5)
    keys = [row_keys(jnp.uint32(seed), jnp.arange(1)) for seed in (0, 0, 1)]
    a, again, other = (encode(model, params, HISTORIES, key) for key in keys)
    np.testing.assert_array_equal(a, again)
    assert np.any(a != other) and np.any(a != encode(model, params, HISTORIES))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_heads": 6, "width": 64}, "num_heads=6 does not divide width=64"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"width": 0}, "width=0"),
        ({"ff_width": 0}, "ff_width=0"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"width": 6, "num_heads": 2, "position": "rotary"}, "even"),
    ],
)
def test_mistakes_in_the_config(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SASRecConfig(**kwargs)
