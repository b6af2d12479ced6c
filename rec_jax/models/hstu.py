"""HSTU: hierarchical sequential transduction units, a transformer whose attention has no softmax."""

from dataclasses import dataclass
from typing import Literal

import flax.nnx as nnx
import jax.numpy as jnp

from rec_jax.models.base import SequenceConfig, SequenceModel
from rec_jax.nn.context import Block, Context
from rec_jax.nn.dense import Dense, dense
from rec_jax.nn.dims import named
from rec_jax.nn.norm import LayerNorm
from rec_jax.nn.pointwise_attention import PointwiseAttention
from rec_jax.tables.embedding import Embedding

_NORMAL = nnx.initializers.normal(0.02)


@dataclass(frozen=True, kw_only=True)
class HSTUConfig(SequenceConfig):
    """time_bias: adds a bias to attention that depends on the time between events. It needs a log with times;
    otherwise, set model.time_bias=False.

    Blocks are replicated along the mesh axis "model", because one kernel packs four groups of heads.
    """

    type: Literal["hstu"] = "hstu"
    num_heads: int = 1
    head_width: int = 0  # dims of a head's queries and keys; 0 = width / num_heads
    value_width: int = 0  # dims of a head's values; 0 = head_width
    full_heads: int = 0  # after pruning: num_heads before it, which norms still use; 0 = num_heads
    time_bias: bool = True
    num_time_buckets: int = 128  # 72 are enough to distinguish all times of 32 bits, in seconds

    def __post_init__(self):
        super().__post_init__()
        self.check_minimums(num_heads=1, head_width=0, value_width=0, full_heads=0, num_time_buckets=1)
        if not self.head_width and self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide width={self.width}: change one of them, or set "
                "head_width (HSTUConfig)"
            )


class HSTUBlock(Block):
    """x + W_o (norm(attention) * U), where U, V, Q, K = SiLU(norm(x) W)."""

    def __init__(self, config: HSTUConfig, max_len: int, *, rngs: nnx.Rngs):
        self.head_width = config.head_width or config.width // config.num_heads
        self.value_width = config.value_width or self.head_width
        self.num_heads, self.dropout_rate = config.num_heads, config.dropout
        inner = self.num_heads * self.value_width
        total = 2 * (inner + self.num_heads * self.head_width)
        self.norm = LayerNorm(config.width, config.full_width)
        uvqk = nnx.Linear(config.width, total, use_bias=False, kernel_init=_NORMAL, rngs=rngs)
        sizes = {"heads": self.num_heads, "head_width": self.head_width, "value_width": self.value_width}
        groups = [(2, "heads", "value_width"), (2, "heads", "head_width")]
        self.uvqk = named(uvqk, "width", groups, **sizes)
        self.position_bias = named(nnx.Param(_NORMAL(rngs.params(), (max_len,))), "distances")
        buckets = (config.num_time_buckets,)
        self.time_bias = (
            named(nnx.Param(_NORMAL(rngs.params(), buckets)), "buckets") if config.time_bias else None
        )
        values, full = ("heads", "value_width"), (config.full_heads or self.num_heads) * self.value_width
        self.attention_norm = LayerNorm(inner, full, values, **sizes)
        out = Dense(inner, config.width, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)
        self.out = named(out, values, "width", **sizes)

    def apply(self, x_BSD, ctx: Context, mix):
        batch, length, width = x_BSD.shape
        inner, keys_width = self.num_heads * self.value_width, self.num_heads * self.head_width
        uvqk_TF = nnx.silu(dense(self.norm(x_BSD).reshape(-1, width), self.uvqk.kernel[...]))
        uvqk_BSF = uvqk_TF.reshape(batch, length, -1)
        u, v, q, k = jnp.split(uvqk_BSF, (inner, 2 * inner, 2 * inner + keys_width), axis=-1)
        q, k, v = (x.reshape(batch, length, self.num_heads, -1) for x in (q, k, v))
        time_bias = None if self.time_bias is None else self.time_bias[...]
        y = mix(PointwiseAttention(self.position_bias[...], time_bias), q, k, v)
        x, y, u = (ctx.only(part) for part in (x_BSD, y.reshape(batch, length, inner), u))
        gated = ctx.dropout(self.attention_norm(y) * u, ctx.site(1, of=1), self.dropout_rate)
        return x + self.out(gated.reshape(-1, inner)).reshape(x.shape), None


class HSTU(SequenceModel):
    """Gated layers of pointwise attention, with biases for the distance and the time between events, and one
    item embedding table for inputs and scores.

    Source: Zhai et al., ICML'24 (arXiv 2402.17152), equations 1 to 3. Initial values, positions added to the
    input, where dropout is applied, and the lack of a final norm, which the paper leaves open, are as in the
    research code in github.com/facebookresearch/generative-recommenders.
    Differs: attention is a mean over the events so far; there, it is a sum divided by the length of the
    padded row. The time between query and key is measured from the query's own event; there, from the event
    to predict, whose time is unknown when recommending. Norms have a scale and a bias.
    """

    def __init__(self, config: HSTUConfig, num_items: int, max_len: int, *, rngs: nnx.Rngs):
        self.config = config
        self.columns = ("time",) if config.time_bias else ()
        self.items = named(Embedding(num_items + 1, config.width, rngs=rngs), "items", "width")
        init = nnx.initializers.truncated_normal(config.width**-0.5)
        positions = Embedding(max_len, config.width, init=init, rngs=rngs)
        self.positions = named(positions, "positions", "width")
        self.blocks = nnx.List([HSTUBlock(config, max_len, rngs=rngs) for _ in range(config.num_layers)])
