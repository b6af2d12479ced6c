"""Self-attention over packed rows: a token attends to its segment, usually to itself and earlier tokens."""

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

# Queries are processed in blocks of about this size. A causal block computes no logits for the keys after it.
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
    """Softmax attention within segments, with the softmax in f32. If is_causal, tokens attend only to
    themselves and earlier tokens.

    segments_BS: int32, 0 = padding. A padding token attends to padding, so no softmax is over an empty set;
    its output is not used.
    """
    return _forward(q_BSNH, k_BSNH, v_BSNH, segments_BS, query_block, is_causal)[0]


def query_blocks(length: int, query_block: int, is_causal: bool):
    """Returns [(start, stop, key_stop)], one for each block: its queries are [start, stop) and attend to keys
    [0, key_stop). The blocks have about equal lengths near `query_block`."""
    num_blocks = max(1, round(length / query_block))
    bounds = [round(i * length / num_blocks) for i in range(num_blocks + 1)]
    return [(start, stop, stop if is_causal else length) for start, stop in itertools.pairwise(bounds)]


def _merge_heads(x_BSNH):
    """Returns [B * N, S, H], a layout in which XLA:CPU multiplies matrices without transposing them first."""
    batch, length, heads, width = x_BSNH.shape
    return x_BSNH.swapaxes(1, 2).reshape(batch * heads, length, width)


def _forward(q_BSNH, k_BSNH, v_BSNH, segments_BS, query_block, is_causal):
    scale = q_BSNH.shape[-1] ** -0.5
    q_GSH, k_GSH, v_GSH = (_merge_heads(x) for x in (q_BSNH * scale, k_BSNH, v_BSNH))
    segments_GS = jnp.repeat(segments_BS, q_BSNH.shape[2], axis=0)
    outs, weights = [], []
    for start, stop, key_stop in query_blocks(q_GSH.shape[1], query_block, is_causal):
        q, k, v = q_GSH[:, start:stop], k_GSH[:, :key_stop], v_GSH[:, :key_stop]
        logits = jnp.einsum("gqh,gkh->gqk", q, k, preferred_element_type=jnp.float32)
        allowed = segments_GS[:, start:stop, None] == segments_GS[:, None, :key_stop]
        if is_causal:
            allowed &= jnp.arange(start, stop)[:, None] >= jnp.arange(key_stop)[None, :]
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
    blocks = query_blocks(length, query_block, is_causal)
    for (start, stop, key_stop), weight in zip(blocks, weights, strict=True):
        q, dout = q_GSH[:, start:stop], dout_GSH[:, start:stop]
        k, v = k_GSH[:, :key_stop], v_GSH[:, :key_stop]
        dweight = jnp.einsum("gqh,gkh->gqk", dout, v, preferred_element_type=jnp.float32)
        inner = jnp.sum(weight * dweight, axis=-1, keepdims=True)
        # Without the barrier XLA:CPU fuses this into the products below and makes them slower.
        dlogits = jax.lax.optimization_barrier((weight * (dweight - inner)).astype(q.dtype))
        dqs.append(jnp.einsum("gqk,gkh->gqh", dlogits, k))
        dk_GSH = dk_GSH.at[:, :key_stop].add(jnp.einsum("gqk,gqh->gkh", dlogits, q))
        dv_GSH = dv_GSH.at[:, :key_stop].add(jnp.einsum("gqk,gqh->gkh", weight, dout))
    dq_GSH = jnp.concatenate(dqs, axis=1) * width**-0.5
    dq, dk, dv = (x.reshape(batch, heads, length, width).swapaxes(1, 2) for x in (dq_GSH, dk_GSH, dv_GSH))
    return dq, dk, dv, None


segment_attention.defvjp(_forward, _backward)


@dataclass(frozen=True)
class SoftmaxAttention:
    """The mixer (`nn.context`) that computes `segment_attention`."""

    is_causal: bool = True

    def __call__(self, q_BSNH, k_BSNH, v_BSNH, ctx: Context):
        return segment_attention(q_BSNH, k_BSNH, v_BSNH, ctx.segments, QUERY_BLOCK, self.is_causal)

    def prefill(self, q_BSNH, k_BSNH, v_BSNH, ctx: Context, query_positions):
        prefix = k_BSNH[query_positions[0]], v_BSNH[query_positions[0]], ctx.visible(query_positions)
        suffix = [ctx.empty_suffix(x, len(query_positions[0])) for x in (k_BSNH, v_BSNH)]
        return self(q_BSNH, k_BSNH, v_BSNH, ctx), prefix, suffix

    def step(self, q_BKNH, k_BKNH, v_BKNH, prefix, suffix, ctx: Context):
        k_BSNH, v_BSNH, visible_BS = prefix
        suffix = k_BKCNH, v_BKCNH = [ctx.append(*x) for x in zip(suffix, (k_BKNH, v_BKNH), strict=True)]
        q_BKNH = q_BKNH * q_BKNH.shape[-1] ** -0.5
        to_prefix = jnp.einsum("bknh,bsnh->bnks", q_BKNH, k_BSNH, preferred_element_type=jnp.float32)
        to_prefix = jnp.where(visible_BS[:, None, None], to_prefix, -jnp.inf)
        to_suffix = jnp.einsum("bknh,bkcnh->bnkc", q_BKNH, k_BKCNH, preferred_element_type=jnp.float32)
        to_suffix = jnp.where(ctx.is_filled(to_suffix.shape[-1])[:, None], to_suffix, -jnp.inf)
        logits = jnp.concatenate([to_prefix, to_suffix], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1).astype(v_BKNH.dtype)
        length = k_BSNH.shape[1]
        out_BKNH = jnp.einsum("bnks,bsnh->bknh", weights[..., :length], v_BSNH)
        return out_BKNH + jnp.einsum("bnkc,bkcnh->bknh", weights[..., length:], v_BKCNH), suffix


class SelfAttention(nnx.Module):
    """Multi-head self-attention. N * H, the width of all heads together, may differ from the width D."""

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
        """Queries come from `x_BSD`, keys and values from `memory_BSD`, usually the same array.
        `ctx.positions` are used only if is_rotary. mix: see `nn.context.Block`."""
        batch, length, width = x_BSD.shape
        is_split = self.query.kernel.shape[1] < self.query.out_features  # by heads, over mesh axis "model"
        if is_split:
            x_BSD, memory_BSD = to_parts(x_BSD), to_parts(memory_BSD)
        heads = (batch, length, -1, self.head_width)
        # Dense layers get tokens as [T, D]: XLA:CPU then needs no transpose for the gradients of weights.
        memory_TD = memory_BSD.reshape(-1, width)
        q = self.query(x_BSD.reshape(-1, width)).reshape(heads)
        keys_values = dense(memory_TD, self.key_value.kernel[...], self.key_value.bias[...])
        k, v = (x.reshape(heads) for x in jnp.split(keys_values, 2, axis=-1))
        if self.is_rotary:
            q, k = rotary(q, ctx.positions), rotary(k, ctx.positions)
        out_TD = mix(SoftmaxAttention(self.is_causal), q, k, v).reshape(batch * length, -1)
        return join(self.out, out_TD, is_split).reshape(x_BSD.shape)
