"""Causal self-attention over packed rows: a token attends to itself and what precedes it in its segment."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

# Queries are processed in blocks of about this many, so that keys of the future are not even computed.
QUERY_BLOCK = 64


def rotary(x_BSNH: jax.Array, positions_BS: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary position embedding over pairs (i, i + H/2). Source: RoFormer, arXiv 2104.09864, eq. 34."""
    half = x_BSNH.shape[-1] // 2
    freq = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BS[:, :, None, None] * freq
    sin, cos = jnp.sin(angle).astype(x_BSNH.dtype), jnp.cos(angle).astype(x_BSNH.dtype)
    a, b = x_BSNH[..., :half], x_BSNH[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def segment_attention(
    q_BSNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    segments_BS: jax.Array,
    query_block: int = QUERY_BLOCK,
) -> jax.Array:
    """Softmax attention, causal and within segments; softmax in f32.

    segments_BS: int32, 0 = padding. A padding token attends to the padding before it, so its row of the
    softmax is never empty; nobody reads it.
    """
    length = q_BSNH.shape[1]
    num_blocks = max(1, round(length / query_block))
    bounds = [round(i * length / num_blocks) for i in range(num_blocks + 1)]
    scale = q_BSNH.shape[-1] ** -0.5
    out = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        logits = jnp.einsum(
            "bqnh,bknh->bnqk",
            q_BSNH[:, start:stop] * scale,
            k_BSNH[:, :stop],
            preferred_element_type=jnp.float32,
        )
        causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        same = segments_BS[:, start:stop, None] == segments_BS[:, None, :stop]
        logits = jnp.where((causal & same)[:, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v_BSNH.dtype)
        out.append(jnp.einsum("bnqk,bknh->bqnh", weights, v_BSNH[:, :stop]))
    return jnp.concatenate(out, axis=1) if num_blocks > 1 else out[0]


class SelfAttention(nnx.Module):
    """Multi-head self-attention; `width` must be divisible by `num_heads`."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.num_heads = num_heads
        self.query = nnx.Linear(width, width, kernel_init=init, rngs=rngs)
        self.key_value = nnx.Linear(width, 2 * width, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=init, rngs=rngs)

    def __call__(self, x_BSD, memory_BSD, segments_BS, positions_BS=None):
        """Queries from `x_BSD`, keys and values from `memory_BSD`, usually the same array.

        positions_BS: given for rotary positions, None where positions are in the input already.
        """
        batch, length, width = x_BSD.shape
        q = self.query(x_BSD).reshape(batch, length, self.num_heads, -1)
        kv = self.key_value(memory_BSD).reshape(batch, length, 2, self.num_heads, -1)
        k, v = kv[:, :, 0], kv[:, :, 1]
        if positions_BS is not None:
            q, k = rotary(q, positions_BS), rotary(k, positions_BS)
        return self.out(segment_attention(q, k, v, segments_BS).reshape(batch, length, width))
