"""Pointwise attention against loops. tests/models/test_hstu.py compares a whole model with its formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.nn import pointwise_attention as lib

pointwise_attention = jax.jit(lib.pointwise_attention, static_argnums=7)
time_buckets = jax.jit(lib.time_buckets, static_argnums=1)
BATCH, HEADS, BLOCK, NUM_BUCKETS = 2, 2, 8, 40


def inputs(length, biases="both"):
    """Returns (all arguments of attention except the query block, times). Rows have several segments, and the
    first row ends with padding. Values are narrower than keys."""
    rng = np.random.default_rng(length)
    segments = np.ones((BATCH, length), np.int32)
    segments[0, length // 2 :] = 2
    segments[0, length - length // 4 :] = 0
    segments[1, 1:] = 2
    times = np.zeros((BATCH, length), np.int32)
    for b, segment in np.ndindex(BATCH, 3):  # times start at 0 in each segment
        inside = segments[b] == segment
        gaps = np.exp(rng.uniform(0, 14, inside.sum())).astype(np.int64)
        times[b, inside] = np.cumsum(gaps) - gaps[:1].sum()
    widths = {"q": 4, "k": 4, "v": 3}
    q, k, v = (np.float32(rng.normal(size=(BATCH, length, HEADS, w))) for w in widths.values())
    position_bias = np.float32(rng.normal(size=length + 2)) if biases in ("position", "both") else None
    time_bias = np.float32(rng.normal(size=NUM_BUCKETS)) if biases in ("time", "both") else None
    buckets = buckets_between(times, NUM_BUCKETS)
    return (q, k, v, segments, position_bias, time_bias, buckets), times


def buckets_between(times, num_buckets):
    times = np.asarray(times, np.int32)
    return np.asarray(time_buckets(times[:, :, None] - times[:, None, :], num_buckets))


def silu(x):
    return x * (1 + np.tanh(x / 2)) / 2


def slow(args, times):
    """One query, one head at a time, in f64."""
    q, k, v, segments, position_bias, time_bias, _ = (
        None if x is None else np.asarray(x, np.float64) for x in args
    )
    out = np.empty_like(v)
    for b, s, head in np.ndindex(segments.shape + (HEADS,)):
        keys = [t for t in range(s + 1) if segments[b, t] == segments[b, s]]
        total = 0
        for t in keys:
            logit = q[b, s, head] @ k[b, t, head]
            if position_bias is not None:
                logit += position_bias[s - t]
            if time_bias is not None:
                seconds = max(1, times[b, s] - times[b, t])
                logit += time_bias[min(int(np.log(float(seconds)) / 0.301), NUM_BUCKETS - 1)]
            total += silu(logit) * v[b, t, head]
        out[b, s, head] = total / len(keys)
    return out


def plain(q, k, v, segments, position_bias, time_bias, buckets):
    """All queries at once, in jnp."""
    length = q.shape[1]
    distance = np.arange(length)[:, None] - np.arange(length)
    visible = (distance >= 0) & (segments[:, :, None] == segments[:, None, :])
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k)
    logits += (position_bias[np.maximum(distance, 0)] + time_bias[buckets])[:, None]
    weights = logits * jax.nn.sigmoid(logits) * visible[:, None]
    weights /= visible.sum(-1)[:, None, :, None]
    return jnp.einsum("bnqk,bkne->bqne", weights, v)


def test_by_hand():
    """One head of width 1: the second query attends to two keys, the third starts a new segment."""
    q, k, v = (jnp.array(x, jnp.float32).reshape(1, 3, 1, 1) for x in ([1, 2, 3], [0, 1, 1], [5, 7, 1]))
    segments, buckets = jnp.array([[1, 1, 2]]), buckets_between([[0, 60, 0]], 20)
    np.testing.assert_array_equal(buckets[0], [[0, 13, 0], [13, 0, 13], [0, 13, 0]])
    out = pointwise_attention(q, k, v, segments, jnp.array([0.0, -1.0, 9.0]), jnp.arange(20) * 1.0, buckets)
    first, second = silu(0.0) * 5, (silu(0 - 1 + 13) * 5 + silu(2.0) * 7) / 2
    np.testing.assert_allclose(out.reshape(3), [first, second, silu(3.0)], rtol=1e-6)


@pytest.mark.parametrize(
    "length, biases",
    [
        (1, "both"),
        (BLOCK + 1, "both"),  # one block
        (BLOCK + BLOCK // 2 + 1, "both"),  # two blocks, of 6 and 7 queries
        (3 * BLOCK, "both"),
        (BLOCK + 1, "none"),
        (BLOCK + 1, "position"),
        (BLOCK + 1, "time"),
    ],
)
def test_equals_a_loop_for_lengths_around_the_query_block(length, biases):
    args, times = inputs(length, biases)
    out = pointwise_attention(*args, BLOCK)
    np.testing.assert_allclose(out, slow(args, times), rtol=1e-4, atol=1e-5)


@functools.cache
def gradients(function, *query_block):
    """Gradients of a weighted sum of the outputs with respect to q, k, v and both biases."""
    args, _ = inputs(3 * BLOCK)
    weights = np.random.default_rng(0).normal(size=args[2].shape)

    def loss(*args):
        return jnp.sum(weights * function(*args, *query_block))

    return jax.jit(jax.grad(loss, (0, 1, 2, 4, 5)))(*args)


@pytest.mark.parametrize("query_block", [BLOCK, 100])
def test_gradients_equal_those_of_a_plain_version(query_block):
    ours = gradients(lib.pointwise_attention, query_block)
    for grad, expected in zip(ours, gradients(plain), strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)


def test_outputs_depend_exactly_on_earlier_tokens_of_the_segment():
    """Row (b, s) of the Jacobian is non-zero exactly for keys and values of the same segment up to s."""
    (q, k, v, segments, *biases), _ = inputs(BLOCK + 1)

    def outputs(k, v):
        return pointwise_attention(q, k, v, segments, *biases, 4).sum((2, 3))

    length = BLOCK + 1
    b, s, other, t = np.ogrid[:BATCH, :length, :BATCH, :length]
    segments = np.asarray(segments)
    depends = (b == other) & (t <= s) & (segments[b, s] == segments[other, t])
    for jacobian in jax.jit(jax.jacrev(outputs, (0, 1)))(k, v):
        np.testing.assert_array_equal(np.any(np.asarray(jacobian) != 0, axis=(-2, -1)), depends)


def test_huge_logits_have_finite_outputs_and_gradients():
    (q, k, *others), times = inputs(BLOCK + 1)
    args = (q * 1e3, k * 1e3, *others)
    expected = slow(args, times)
    out = pointwise_attention(*args, BLOCK)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    grads = jax.jit(jax.grad(lambda *args: pointwise_attention(*args).sum(), (0, 1, 2, 4, 5)))(*args)
    assert all(np.isfinite(x).all() and np.any(x != 0) for x in grads)


def test_bf16_is_summed_in_f32_forward_and_backward():
    """Products of queries and keys are near 200, where bf16 has steps of 1, and the biases subtract about as
    much. A sum over 300 keys in bf16 would lose some of them. Results are rounded to bf16 twice: the weights
    (or their gradients), and the sum."""
    length, two_roundings = 300, dict(rtol=2**-7)
    rng = np.random.default_rng(0)
    q, v = (jnp.full((1, length, 1, width), 1.75, jnp.bfloat16) for width in (64, 1))
    k = jnp.asarray(rng.normal(1.75, 0.1, (1, length, 1, 64)), jnp.bfloat16)
    position_bias, time_bias = (jnp.full(size, -95, jnp.bfloat16) for size in (length, 1))
    buckets, segments = jnp.zeros((1, length, length), jnp.int32), jnp.ones((1, length), jnp.int32)

    @jax.jit
    def run(q, k, v, *biases):
        out, pull = jax.vjp(
            lambda *biases: lib.pointwise_attention(q, k, v, segments, *biases, buckets), *biases
        )
        return out, pull(jnp.ones_like(out))

    out, grads = run(q, k, v, position_bias, time_bias)
    assert {x.dtype for x in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}
    out, position_grads, time_grads = (np.asarray(x, np.float64) for x in (out, *grads))
    logits = np.asarray(k[0, :, 0], np.float64) @ np.asarray(q[0, 0, 0], np.float64) - 190  # of each key
    num_keys = np.arange(1, length + 1)
    np.testing.assert_allclose(out[0, :, 0, 0], 1.75 * np.cumsum(silu(logits)) / num_keys, **two_roundings)
    sigmoid = 1 / (1 + np.exp(-logits))
    slopes = 1.75 * sigmoid * (1 + logits * (1 - sigmoid))
    # For each distance, the sum over queries with a key at this distance; each key has weight 1 / num_keys.
    expected = [np.sum(slopes[: length - d] / num_keys[d:]) for d in range(length)]
    np.testing.assert_allclose(position_grads, expected, **two_roundings)
    np.testing.assert_allclose(time_grads, [np.sum(expected)], **two_roundings)


def test_time_buckets():
    seconds = np.array([0, 1, 2, 60, 3600, 86400, 2**31 - 1])
    buckets = buckets_between(seconds[None], 128)[0]
    np.testing.assert_array_equal(buckets[:, 0], [0, 0, 2, 13, 27, 37, 71])
    np.testing.assert_array_equal(buckets[0], buckets[:, 0])
    clipped = buckets_between(seconds[None], 20)[0]
    np.testing.assert_array_equal(clipped[:, 0], [0, 0, 2, 13, 19, 19, 19])
