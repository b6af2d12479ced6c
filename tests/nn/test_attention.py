"""Attention against loops. tests/models/test_sasrec.py compares a whole model with its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.nn import attention
from rec_jax.nn.attention import rotary

segment_attention = jax.jit(attention.segment_attention, static_argnums=(4, 5))
LENGTH = 18
SEGMENTS = np.array([[1] * 7 + [2] * 8 + [0] * 3, [1] * 18])


def inputs(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(2, LENGTH, 2, 4)) * 2, dtype) for _ in range(3)]


def slow(q, k, v, is_causal=True):
    """One query, one head at a time, in f64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.empty_like(q)
    for b, s, head in np.ndindex(2, LENGTH, 2):
        visible = range(s + 1 if is_causal else LENGTH)
        keys = [t for t in visible if SEGMENTS[b, t] == SEGMENTS[b, s]]
        logits = k[b, keys, head] @ q[b, s, head] / np.sqrt(4)
        weights = np.exp(logits - logits.max())
        out[b, s, head] = weights @ v[b, keys, head] / weights.sum()
    return out


# One block, three even blocks, four uneven blocks, and single queries.
@pytest.mark.parametrize("query_block", [100, 7, 5, 1])
def test_equals_a_loop_for_any_query_block(query_block):
    out = segment_attention(*inputs(), jnp.asarray(SEGMENTS), query_block)
    np.testing.assert_allclose(out, slow(*inputs()), rtol=1e-4, atol=1e-5)


def test_attention_that_is_not_causal_equals_a_loop():
    out = segment_attention(*inputs(), jnp.asarray(SEGMENTS), 7, False)
    np.testing.assert_allclose(out, slow(*inputs(), is_causal=False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients_equal_those_of_a_plain_softmax(is_causal):
    dout = jnp.asarray(np.random.default_rng(1).normal(size=(2, LENGTH, 2, 4)), jnp.float32)
    allowed = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    if is_causal:
        allowed &= np.tri(LENGTH, dtype=bool)

    def plain(q, k, v):
        logits = jnp.einsum("bqnh,bknh->bnqk", q, k) / 2
        weights = jax.nn.softmax(jnp.where(allowed[:, None], logits, -jnp.inf))
        return jnp.sum(jnp.einsum("bnqk,bknh->bqnh", weights, v) * dout)

    def ours(q, k, v):
        return jnp.sum(segment_attention(q, k, v, jnp.asarray(SEGMENTS), 5, is_causal) * dout)

    grads, expected = (jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs()) for loss in (ours, plain))
    for grad, expected_grad in zip(grads, expected, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_outputs_depend_only_on_earlier_tokens_of_the_segment():
    """Row (b, s) of the Jacobian is non-zero only for keys and values of the same segment up to s."""
    q, k, v = inputs()

    def outputs(k, v):
        return segment_attention(q, k, v, jnp.asarray(SEGMENTS), 5).sum((2, 3))  # [2, LENGTH]

    for grad in jax.jit(jax.jacrev(outputs, (0, 1)))(k, v):
        depends = np.any(np.asarray(grad) != 0, axis=(-2, -1))  # [b, s, other, t]
        b, s, other, t = np.ogrid[:2, :LENGTH, :2, :LENGTH]
        may_depend = (b == other) & (t <= s) & (SEGMENTS[b, s] == SEGMENTS[other, t])
        # Not equal: the weight of a token that attends only to itself is 1, whatever its key.
        assert not np.any(depends & ~may_depend)
        assert depends[0, 6, 0, :7].all() and depends[0, 14, 0, 7:15].all()


def test_huge_logits_stay_finite():
    q, k, v = inputs()
    out = segment_attention(q * 1e3, k * 1e3, v, jnp.asarray(SEGMENTS), 7)
    np.testing.assert_allclose(out, slow(q * 1e3, k * 1e3, v), rtol=1e-4, atol=1e-5)


def test_bf16_logits_are_summed_in_f32():
    """Logits are near 200, where bf16 has steps of 1; the softmax must not get them rounded to bf16."""
    q, k, v = inputs(dtype=jnp.bfloat16)
    q, k = q * 8, k * 8
    out = segment_attention(q, k, v, jnp.asarray(SEGMENTS), 6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), slow(q, k, v), atol=0.05)


def test_rotary_products_depend_only_on_distance_and_lengths_are_kept():
    x, y = (jnp.asarray(np.random.default_rng(i).normal(size=(1, 1, 1, 8)), jnp.float32) for i in (0, 1))

    rotated = jax.jit(rotary)

    def score(s, t):
        return float(np.sum(np.asarray(rotated(x, np.array([[s]]))) * rotated(y, np.array([[t]]))))

    assert score(9, 4) == pytest.approx(score(25, 20), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-2)
    assert score(9, 4) != pytest.approx(score(4, 9), rel=1e-2)
    np.testing.assert_array_equal(rotated(x, np.array([[0]])), x)
    lengths = [np.linalg.norm(np.asarray(rotated(x, np.array([[s]])))) for s in (0, 77)]
    np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-6)
