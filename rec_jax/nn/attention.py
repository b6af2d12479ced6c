"""Self-attention over packed rows: a token attends to its segment, usually to itself and what precedes it."""

import itertools
from dataclasses import dataclass
from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.nn.context import Context
from rec_jax.nn.dense import Dense, dense
from rec_jax.nn.dims import named
from rec_jax.nn.parallel import join, to_parts

# Queries are processed in blocks of about this many, so that keys of the future are not even computed.
QUERY_BLOCK = 50


def rotary(x_BSNH: jax.Array, positions_BS: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary position embedding over pairs (i, i + H/2). Source: RoFormer, arXiv 2104.09864, eq. 34."""
    half = x_BSNH.shape[-1] // 2
    freq = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BS[:, :, None, None] * freq
    sin, cos = jnp.sin(angle).astype(x_BSNH.dtype), jnp.cos(angle).astype(x_BSNH.dtype)
    a, b = x_BSNH[..., :half], x_BSNH[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def segment_attention(
    q_BSNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    segments_BS: jax.Array,
    query_block: int = QUERY_BLOCK,
    is_causal: bool = True,
) -> jax.Array:
    """Softmax attention within segments, to the past alone if is_causal; softmax in f32.

    segments_BS: int32, 0 = padding. A padding token attends to the padding before it, so its row of the
    softmax is never empty; nobody reads it.
    """
    return _forward(q_BSNH, k_BSNH, v_BSNH, segments_BS, query_block, is_causal)[0]


def query_blocks(length: int, query_block: int, is_causal: bool):
    """(first query, behind the last query, behind the last key) of blocks of queries, of even lengths near
    `query_block`."""
    num_blocks = max(1, round(length / query_block))
    bounds = [round(i * length / num_blocks) for i in range(num_blocks + 1)]
    return [(start, stop, stop if is_causal else length) for start, stop in itertools.pairwise(bounds)]


def _merge_heads(x_BSNH):
    """[B * N, S, H], on which XLA:CPU multiplies matrices without transposing them first."""
    batch, length, heads, width = x_BSNH.shape
    return x_BSNH.swapaxes(1, 2).reshape(batch * heads, length, width)


def _forward(q_BSNH, k_BSNH, v_BSNH, segments_BS, query_block, is_causal):
    scale = q_BSNH.shape[-1] ** -0.5
    q_GSH, k_GSH, v_GSH = (_merge_heads(x) for x in (q_BSNH * scale, k_BSNH, v_BSNH))
    segments_GS = jnp.repeat(segments_BS, q_BSNH.shape[2], axis=0)
    outs, weights = [], []
    for start, stop, end in query_blocks(q_GSH.shape[1], query_block, is_causal):
        q, k, v = q_GSH[:, start:stop], k_GSH[:, :end], v_GSH[:, :end]
        logits = jnp.einsum("gqh,gkh->gqk", q, k, preferred_element_type=jnp.float32)
        allowed = segments_GS[:, start:stop, None] == segments_GS[:, None, :end]
        if is_causal:
            allowed &= jnp.arange(start, stop)[:, None] >= jnp.arange(end)[None, :]
        logits = jnp.where(allowed, logits, -jnp.inf)
        weights.append(jax.nn.softmax(logits, axis=-1).astype(v.dtype))
        outs.append(jnp.einsum("gqk,gkh->gqh", weights[-1], v))
    out_GSH = jnp.concatenate(outs, axis=1)
    batch, length, heads, width = q_BSNH.shape
    out_BSNH = out_GSH.reshape(batch, heads, length, width).swapaxes(1, 2)
    return out_BSNH, (q_GSH, k_GSH, v_GSH, weights)


def _backward(query_block, is_causal, residuals, dout_BSNH):
    q_GSH, k_GSH, v_GSH, weights = residuals
    batch, length, heads, width = dout_BSNH.shape
    dout_GSH = _merge_heads(dout_BSNH)
    dqs, dk_GSH, dv_GSH = [], jnp.zeros_like(k_GSH), jnp.zeros_like(v_GSH)
    for (start, stop, end), weight in zip(query_blocks(length, query_block, is_causal), weights, strict=True):
        q, k, v, dout = q_GSH[:, start:stop], k_GSH[:, :end], v_GSH[:, :end], dout_GSH[:, start:stop]
        dweight = jnp.einsum("gqh,gkh->gqk", dout, v, preferred_element_type=jnp.float32)
        inner = jnp.sum(weight * dweight, axis=-1, keepdims=True)
        # Without the barrier XLA:CPU fuses this into the products below, which makes them slower.
        dlogits = jax.lax.optimization_barrier((weight * (dweight - inner)).astype(q.dtype))
        dqs.append(jnp.einsum("gqk,gkh->gqh", dlogits, k))
        dk_GSH = dk_GSH.at[:, :end].add(jnp.einsum("gqk,gqh->gkh", dlogits, q))
        dv_GSH = dv_GSH.at[:, :end].add(jnp.einsum("gqk,gqh->gkh", weight, dout))
    dq_GSH = jnp.concatenate(dqs, axis=1) * width**-0.5
    dq, dk, dv = (x.reshape(batch, heads, length, width).swapaxes(1, 2) for x in (dq_GSH, dk_GSH, dv_GSH))
    return dq, dk, dv, None


segment_attention.defvjp(_forward, _backward)


@dataclass(frozen=True)
class SoftmaxAttention:
    """`segment_attention` as a mixer (`nn.context`)."""

    is_causal: bool = True

    def __call__(self, q_BSNH, k_BSNH, v_BSNH, ctx: Context):
        return segment_attention(q_BSNH, k_BSNH, v_BSNH, ctx.segments, QUERY_BLOCK, self.is_causal)

    def prefill(self, q_BSNH, k_BSNH, v_BSNH, ctx: Context, query_positions):
        prefix = k_BSNH[query_positions[0]], v_BSNH[query_positions[0]], ctx.seen(query_positions)
        suffix = [ctx.empty(x, len(query_positions[0])) for x in (k_BSNH, v_BSNH)]
        return self(q_BSNH, k_BSNH, v_BSNH, ctx), prefix, suffix

    def step(self, q_BKNH, k_BKNH, v_BKNH, prefix, suffix, ctx: Context):
        k_BSNH, v_BSNH, seen_BS = prefix
        suffix = k_BKCNH, v_BKCNH = [ctx.added(*x) for x in zip(suffix, (k_BKNH, v_BKNH), strict=True)]
        q_BKNH = q_BKNH * q_BKNH.shape[-1] ** -0.5
        to_prefix = jnp.einsum("bknh,bsnh->bnks", q_BKNH, k_BSNH, preferred_element_type=jnp.float32)
        to_prefix = jnp.where(seen_BS[:, None, None], to_prefix, -jnp.inf)
        to_suffix = jnp.einsum("bknh,bkcnh->bnkc", q_BKNH, k_BKCNH, preferred_element_type=jnp.float32)
        to_suffix = jnp.where(ctx.is_added(to_suffix.shape[-1])[:, None], to_suffix, -jnp.inf)
        weights = jax.nn.softmax(jnp.concatenate([to_prefix, to_suffix], axis=-1), axis=-1).astype(
            v_BKNH.dtype
        )
        num = k_BSNH.shape[1]
        out_BKNH = jnp.einsum("bnks,bsnh->bknh", weights[..., :num], v_BSNH)
        return out_BKNH + jnp.einsum("bnkc,bkcnh->bknh", weights[..., num:], v_BKCNH), suffix


class SelfAttention(nnx.Module):
    """Multi-head self-attention. The heads together may be narrower than the input, [D, N * H] and back."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        *,
        is_causal: bool = True,
        is_rotary: bool = False,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.xavier_uniform()
        self.head_width, self.is_causal, self.is_rotary = head_width, is_causal, is_rotary
        inner, heads = num_heads * head_width, ("heads", "head_width")
        query = Dense(width, inner, kernel_init=init, rngs=rngs)
        key_value = nnx.LinearGeneral(width, (2, inner), kernel_init=init, rngs=rngs)
        out = Dense(inner, width, kernel_init=init, rngs=rngs)
        self.query = named(query, "width", heads, heads=num_heads)
        self.key_value = named(key_value, "width", 2, heads, heads=num_heads)
        self.out = named(out, heads, "width", heads=num_heads)

    def __call__(self, x_BSD, memory_BSD, ctx: Context, mix):
        """Queries from `x_BSD`, keys and values from `memory_BSD`, usually the same array. Positions are read
        if is_rotary; else they are in the input already. mix: see `nn.context.Block`."""
        batch, length, width = x_BSD.shape
        is_split = self.query.kernel.shape[1] < self.query.out_features  # over "model", by heads
        if is_split:
            x_BSD, memory_BSD = to_parts(x_BSD), to_parts(memory_BSD)
        heads = (batch, length, -1, self.head_width)
        # Dense layers see lists of tokens: so XLA:CPU need not transpose for the gradients of their weights.
        memory_TD = memory_BSD.reshape(-1, width)
        q = self.query(x_BSD.reshape(-1, width)).reshape(heads)
        both = dense(memory_TD, self.key_value.kernel[...], self.key_value.bias[...])
        k, v = (x.reshape(heads) for x in jnp.split(both, 2, axis=-1))
        if self.is_rotary:
            q, k = rotary(q, ctx.positions), rotary(k, ctx.positions)
        out_TD = mix(SoftmaxAttention(self.is_causal), q, k, v).reshape(batch * length, -1)
        return join(self.out, out_TD, is_split).reshape(x_BSD.shape)
