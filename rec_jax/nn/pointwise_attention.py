"""Attention without a softmax over packed rows: its output shows how much the keys match, not only which."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rec_jax.nn.attention import QUERY_BLOCK, query_blocks
from rec_jax.nn.context import Context
from rec_jax.tree import cast_floats

_BUCKET_WIDTH = 0.301  # in ln(seconds)


def time_buckets(seconds: jax.Array, num_buckets: int) -> jax.Array:
    """int32 like `seconds`: the bucket of each time between a key and a query. Up to 1 s is bucket 0, a
    minute 13, a day 37; the largest possible is 71.

    Source: `generative_recommenders/research/modeling/sequential/hstu.py` of github.com/facebookresearch/
    generative-recommenders. Differs: in that code, a query has the time of the event to predict.
    """
    log = jnp.log(jnp.maximum(jnp.abs(seconds), 1).astype(jnp.float32))
    return jnp.minimum(jnp.floor(log / _BUCKET_WIDTH).astype(jnp.int32), num_buckets - 1)


def pointwise_attention(
    q_BSNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNE: jax.Array,
    segments_BS: jax.Array,
    position_bias_L: jax.Array | None = None,
    time_bias_M: jax.Array | None = None,
    buckets_BSS: jax.Array | None = None,
    query_block: int = QUERY_BLOCK,
) -> jax.Array:
    """The mean over keys k of SiLU(q . k + bias) v, causal and within segments; out_BSNE, summed in f32.

    The mean is over the keys that a query attends to: itself and the earlier tokens of its segment.
    segments_BS: int32, 0 = padding; a padding token attends to padding, and its output is not used.
    position_bias_L: indexed by the distance between query and key; L is at least the longest segment.
    time_bias_M: indexed by buckets_BSS, the bucket from `time_buckets` of each query and key. All heads share
    both biases.

    The gradient is automatic: a handwritten one, like that of `segment_attention`, takes as long on a CPU.
    The gradient of time_bias_M is a scatter; products with one-hot vectors take several times as long.

    Source: Zhai et al., ICML'24 (arXiv 2402.17152), equation 2. Differs: the sum is divided by the number of
    keys that the query attends to; the reference implementation divides by the length of the padded row.
    """
    # In f32, so that their gradients, which are sums over all pairs of tokens, are in f32 too.
    position_bias_L, time_bias_M = cast_floats((position_bias_L, time_bias_M), jnp.float32)
    q_BNSH, k_BNSH, v_BNSE = (x.swapaxes(1, 2) for x in (q_BSNH, k_BSNH, v_BSNE))
    outs = []
    for start, stop, _ in query_blocks(q_BNSH.shape[2], query_block, True):  # skips later keys
        q, k, v = q_BNSH[:, :, start:stop], k_BNSH[:, :, :stop], v_BNSE[:, :, :stop]
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(stop)
        visible = (distance >= 0) & (segments_BS[:, start:stop, None] == segments_BS[:, None, :stop])
        logits = jnp.einsum("bnqh,bnkh->bnqk", q, k, preferred_element_type=jnp.float32)
        if position_bias_L is not None:
            logits += position_bias_L[jnp.maximum(distance, 0)]
        if time_bias_M is not None:
            logits += time_bias_M[buckets_BSS[:, start:stop, :stop]][:, None]
        weights = jnp.where(visible[:, None], jax.nn.silu(logits), 0).astype(v.dtype)
        total = jnp.einsum("bnqk,bnke->bnqe", weights, v, preferred_element_type=jnp.float32)
        count = jnp.sum(visible, axis=-1)[:, None, :, None]
        outs.append((total / count).astype(v.dtype))
    return jnp.concatenate(outs, axis=2).swapaxes(1, 2)


@dataclass(frozen=True)
class PointwiseAttention:
    """The mixer (`nn.context`) that computes `pointwise_attention`. time_bias_M: None = no time bias."""

    position_bias_L: jax.Array
    time_bias_M: jax.Array | None

    def __call__(self, q_BSNH, k_BSNH, v_BSNE, ctx: Context):
        buckets_BSS = None
        if self.time_bias_M is not None:
            times_BS = ctx.columns["time"]
            buckets_BSS = time_buckets(times_BS[:, :, None] - times_BS[:, None, :], len(self.time_bias_M))
        biases = self.position_bias_L, self.time_bias_M, buckets_BSS
        return pointwise_attention(q_BSNH, k_BSNH, v_BSNE, ctx.segments, *biases)

    def _memory(self, k, v, ctx: Context) -> dict[str, jax.Array]:
        """Returns what a query reads of its keys: keys, values, positions and, for the time bias, times."""
        memory = {"k": k, "v": v, "position": ctx.positions}
        return memory if self.time_bias_M is None else memory | {"time": ctx.columns["time"]}

    def prefill(self, q_BSNH, k_BSNH, v_BSNE, ctx: Context, query_positions):
        memory = self._memory(k_BSNH, v_BSNE, ctx)
        prefix = {name: x[query_positions[0]] for name, x in memory.items()}
        prefix["visible"] = ctx.visible(query_positions)
        suffix = {name: ctx.empty_suffix(x, len(query_positions[0])) for name, x in memory.items()}
        return self(q_BSNH, k_BSNH, v_BSNE, ctx), prefix, suffix

    def step(self, q_BKNH, k_BKNH, v_BKNE, prefix, suffix, ctx: Context):
        new = self._memory(k_BKNH, v_BKNE, ctx)
        suffix = {name: ctx.append(suffix[name], x) for name, x in new.items()}
        total, count = 0.0, 0
        is_filled = ctx.is_filled(suffix["k"].shape[2])
        # Keys X of the history, shared by all K continuations, and keys X of each continuation.
        for dims, keys, visible in (("bx", prefix, prefix["visible"][:, None]), ("bkx", suffix, is_filled)):
            since = {name: new[name][..., None] - _per_beam(keys[name]) for name in new if name not in "kv"}
            logits_BKNX = jnp.einsum(
                f"bknh,{dims}nh->bknx", q_BKNH, keys["k"], preferred_element_type=jnp.float32
            )
            bias_BKX = self.position_bias_L.astype(jnp.float32)[jnp.maximum(since["position"], 0)]
            if self.time_bias_M is not None:
                buckets_BKX = time_buckets(since["time"], len(self.time_bias_M))
                bias_BKX += self.time_bias_M.astype(jnp.float32)[buckets_BKX]
            weights = jnp.where(visible[:, :, None], jax.nn.silu(logits_BKNX + bias_BKX[:, :, None]), 0)
            weights, v = weights.astype(v_BKNE.dtype), keys["v"]
            total += jnp.einsum(f"bknx,{dims}ne->bkne", weights, v, preferred_element_type=jnp.float32)
            count += jnp.sum(visible, axis=-1)
        return (total / count[..., None, None]).astype(v_BKNE.dtype), suffix


def _per_beam(x):
    """Returns [B, X], shared by all continuations, as [B, 1, X]; returns [B, K, X] unchanged."""
    return x[:, None] if x.ndim == 2 else x
