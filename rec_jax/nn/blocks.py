"""Transformer blocks of the sequence models."""

from dataclasses import dataclass

import flax.nnx as nnx

from rec_jax.nn.attention import SelfAttention
from rec_jax.nn.context import Block, Context
from rec_jax.nn.dense import Dense
from rec_jax.nn.dims import named
from rec_jax.nn.experts import Experts, Mixture
from rec_jax.nn.norm import LayerNorm
from rec_jax.nn.parallel import join, to_parts


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """The settings of a transformer block. full_width: see `nn.norm.layer_norm`. mixture: a mixture of
    experts that replaces the feed-forward layer."""

    width: int
    num_heads: int
    head_width: int
    ff_width: int
    activation: str
    dropout: float
    norm: str = "pre"
    full_width: int = 0
    is_causal: bool = True
    is_rotary: bool = False
    mixture: Mixture | None = None

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.width, self.full_width)

    def make_attention(self, rngs: nnx.Rngs) -> SelfAttention:
        return SelfAttention(
            self.width,
            self.num_heads,
            self.head_width,
            is_causal=self.is_causal,
            is_rotary=self.is_rotary,
            rngs=rngs,
        )

    def make_experts(self, rngs: nnx.Rngs, is_gated: bool = False) -> Experts:
        return Experts(self.width, self.ff_width, self.activation, self.mixture, is_gated=is_gated, rngs=rngs)


class FeedForward(nnx.Module):
    """Two dense layers with a non-linearity between them."""

    def __init__(self, width: int, ff_width: int, activation: str, *, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.up = named(Dense(width, ff_width, kernel_init=init, rngs=rngs), "width", "ff_width")
        self.down = named(Dense(ff_width, width, kernel_init=init, rngs=rngs), "ff_width", "width")
        self.activation = activation

    def __call__(self, x_BSD, ctx: Context):
        """Returns (y_BSD, None): a feed-forward layer has no penalty."""
        is_split = self.up.kernel.shape[1] < self.up.out_features  # by channels, over mesh axis "model"
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        hidden_TF = getattr(nnx, self.activation)(self.up(to_parts(x_TD) if is_split else x_TD))
        return join(self.down, hidden_TF, is_split).reshape(x_BSD.shape), None


class TransformerBlock(Block):
    """Attention, then feed-forward, each with a residual connection.

    norm="pre": x + f(norm(x)) for both.
    norm="post": norm(x) + f(norm(x)) for both, so that a residual sum is always read through its norm.
    norm="original": as in SASRec: like "post", but keys and values come from the input before the norm.
    """

    def __init__(self, shape: TransformerShape, *, rngs: nnx.Rngs):
        self.attention_norm, self.attention = shape.make_norm(), shape.make_attention(rngs)
        self.ff_norm = shape.make_norm()
        if shape.mixture:
            self.ff = shape.make_experts(rngs)
        else:
            self.ff = FeedForward(shape.width, shape.ff_width, shape.activation, rngs=rngs)
        self.norm, self.rate = shape.norm, shape.dropout

    def apply(self, x_BSD, ctx: Context, mix):
        normed = self.attention_norm(x_BSD)
        residual = x_BSD if self.norm == "pre" else normed
        memory = x_BSD if self.norm == "original" else normed
        attended = self.attention(normed, memory, ctx, mix)
        x = ctx.only(residual + ctx.dropout(attended, ctx.site(1, of=2), self.rate))
        normed = self.ff_norm(x)
        y, penalty_B = self.ff(normed, ctx)
        y = ctx.dropout(y, ctx.site(2, of=2), self.rate)
        return (x if self.norm == "pre" else normed) + y, penalty_B
