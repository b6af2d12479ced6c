"""Attention without a softmax over packed rows: how much there is to attend to shows in what comes out."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rec_jax.nn.attention import QUERY_BLOCK, query_blocks
from rec_jax.nn.context import Context
from rec_jax.tree import cast_floats

_BUCKET_WIDTH = 0.301  # in ln(seconds)


def time_buckets(seconds: jax.Array, num_buckets: int) -> jax.Array:
    """int32 like `seconds`, which lie between a key and a query: the bucket of each. Up to a second is bucket
    0, a minute 13, a day 37; none is beyond 71.

    Source: `generative_recommenders/research/modeling/sequential/hstu.py` of github.com/facebookresearch/
    generative-recommenders. Differs: its query has the time of the event that is to be predicted.
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

    The mean is over the keys that a query sees: itself and what precedes it in its segment. segments_BS:
    int32, 0 = padding; a padding token sees the padding before it, and nobody reads it. position_bias_L:
    added at the distance of query and key; L is at least the longest segment. time_bias_M: added at their
    bucket, of `time_buckets`. Both are shared by the heads.

    The gradient is the automatic one: written out, as that of `segment_attention` is, it takes as long on a
    CPU. For time_bias_M it scatters; products with one-hot vectors take several times as long.

    Source: Zhai et al., ICML'24 (arXiv 2402.17152), equation 2, whose reference implementation divides by the
    length of the padded row. Differs: by the number of keys seen so far.
    """
    # So that their gradients, sums over all pairs of tokens, are in f32 too.
    position_bias_L, time_bias_M = cast_floats((position_bias_L, time_bias_M), jnp.float32)
    q_BNSH, k_BNSH, v_BNSE = (x.swapaxes(1, 2) for x in (q_BSNH, k_BSNH, v_BSNE))
    outs = []
    for start, stop, _ in query_blocks(q_BNSH.shape[2], query_block, True):  # no keys of the future
        q, k, v = q_BNSH[:, :, start:stop], k_BNSH[:, :, :stop], v_BNSE[:, :, :stop]
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(stop)
        seen = (distance >= 0) & (segments_BS[:, start:stop, None] == segments_BS[:, None, :stop])
        logits = jnp.einsum("bnqh,bnkh->bnqk", q, k, preferred_element_type=jnp.float32)
        if position_bias_L is not None:
            logits += position_bias_L[jnp.maximum(distance, 0)]
        if time_bias_M is not None:
            logits += time_bias_M[buckets_BSS[:, start:stop, :stop]][:, None]
        weights = jnp.where(seen[:, None], jax.nn.silu(logits), 0).astype(v.dtype)
        total = jnp.einsum("bnqk,bnke->bnqe", weights, v, preferred_element_type=jnp.float32)
        count = jnp.sum(seen, axis=-1)[:, None, :, None]
        outs.append((total / count).astype(v.dtype))
    return jnp.concatenate(outs, axis=2).swapaxes(1, 2)


@dataclass(frozen=True)
class PointwiseAttention:
    """`pointwise_attention` as a mixer (`nn.context`). time_bias_M: None = times are not read."""

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
        """What later tokens read of these: keys, values, positions, and times for their bias."""
        memory = {"k": k, "v": v, "position": ctx.positions}
        return memory if self.time_bias_M is None else memory | {"time": ctx.columns["time"]}

    def prefill(self, q_BSNH, k_BSNH, v_BSNE, ctx: Context, query_positions):
        memory = self._memory(k_BSNH, v_BSNE, ctx)
        prefix = {name: x[query_positions[0]] for name, x in memory.items()} | {
            "seen": ctx.seen(query_positions)
        }
        suffix = {name: ctx.empty(x, len(query_positions[0])) for name, x in memory.items()}
        return self(q_BSNH, k_BSNH, v_BSNE, ctx), prefix, suffix

    def step(self, q_BKNH, k_BKNH, v_BKNE, prefix, suffix, ctx: Context):
        new = self._memory(k_BKNH, v_BKNE, ctx)
        suffix = {name: ctx.added(suffix[name], x) for name, x in new.items()}
        total, count = 0.0, 0
        seen_suffix = ctx.is_added(suffix["k"].shape[2])
        # Keys X of the history, the same for all K, and those that each continuation has added.
        for dims, keys, seen in (("bx", prefix, prefix["seen"][:, None]), ("bkx", suffix, seen_suffix)):
            since = {name: new[name][..., None] - _per_beam(keys[name]) for name in new if name not in "kv"}
            logits_BKNX = jnp.einsum(
                f"bknh,{dims}nh->bknx", q_BKNH, keys["k"], preferred_element_type=jnp.float32
            )
            bias_BKX = self.position_bias_L.astype(jnp.float32)[jnp.maximum(since["position"], 0)]
            if self.time_bias_M is not None:
                buckets_BKX = time_buckets(since["time"], len(self.time_bias_M))
                bias_BKX += self.time_bias_M.astype(jnp.float32)[buckets_BKX]
            weights = jnp.where(seen[:, :, None], jax.nn.silu(logits_BKNX + bias_BKX[:, :, None]), 0)
            weights, v = weights.astype(v_BKNE.dtype), keys["v"]
            total += jnp.einsum(f"bknx,{dims}ne->bkne", weights, v, preferred_element_type=jnp.float32)
            count += jnp.sum(seen, axis=-1)
        return (total / count[..., None, None]).astype(v_BKNE.dtype), suffix


def _per_beam(x):
    """[B, X] of a history as [B, 1, X]; [B, K, X] as it is."""
    return x[:, None] if x.ndim == 2 else x
