"""One new token at a time through a causal transformer block, against the keys and values of earlier ones."""

import jax
import jax.numpy as jnp

from rec_jax.nn.blocks import TransformerBlock
from rec_jax.nn.dense import dense


def keys_values(block: TransformerBlock, x):
    """(k, v), each [..., N, H], of the block's inputs x [..., D]."""
    attention = block.attention
    memory = x if block.norm == "original" else block.attention_norm(x)
    both = dense(
        memory.reshape(-1, x.shape[-1]), attention.key_value.kernel[...], attention.key_value.bias[...]
    )
    return (y.reshape(*x.shape[:-1], -1, attention.head_width) for y in jnp.split(both, 2, axis=-1))


def decode_block(block: TransformerBlock, x_BKD, past, own=None):
    """The block's output for one token of each of K continuations of B histories, without dropout.

    past: (k_BSNH, v_BSNH, allowed_BS), what all continuations of a history look at. own: (k_BKTNH, v_BKTNH),
    what each has added so far, or None. Returns (x_BKD, own with this token).
    """
    k_past, v_past, allowed_BS = past
    k, v = keys_values(block, x_BKD)
    own = (
        [k[:, :, None], v[:, :, None]]
        if own is None
        else [jnp.concatenate([old, new[:, :, None]], axis=2) for old, new in zip(own, (k, v), strict=True)]
    )
    normed = block.attention_norm(x_BKD)
    q = block.attention.query(normed.reshape(-1, normed.shape[-1])).reshape(k.shape) * k.shape[-1] ** -0.5
    to_past = jnp.einsum("bknh,bsnh->bnks", q, k_past, preferred_element_type=jnp.float32)
    to_past = jnp.where(allowed_BS[:, None, None], to_past, -jnp.inf)
    to_own = jnp.einsum("bknh,bktnh->bnkt", q, own[0], preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.concatenate([to_past, to_own], axis=-1), axis=-1).astype(v.dtype)
    num_past = k_past.shape[1]
    out = jnp.einsum("bnks,bsnh->bknh", weights[..., :num_past], v_past)
    out += jnp.einsum("bnkt,bktnh->bknh", weights[..., num_past:], own[1])
    out = block.attention.out(out.reshape(-1, out.shape[-2] * out.shape[-1])).reshape(x_BKD.shape)
    x_BKD = (x_BKD if block.norm == "pre" else normed) + out
    normed = block.ff_norm(x_BKD)
    return (x_BKD if block.norm == "pre" else normed) + block.ff(normed), own
