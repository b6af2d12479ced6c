"""eSASRec: SASRec's causal transformer with gated blocks and a short convolution."""

from dataclasses import dataclass
from typing import Literal

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.nn.blocks import TransformerShape
from rec_jax.nn.context import Block, Context
from rec_jax.nn.convolution import CausalConv
from rec_jax.nn.dense import Dense, dense
from rec_jax.nn.dims import named
from rec_jax.nn.parallel import join, to_parts


@dataclass(frozen=True, kw_only=True)
class ESASRecConfig(SASRecConfig):
    type: Literal["esasrec"] = "esasrec"
    activation: Literal["silu"] = "silu"  # of the feed-forward's gate
    norm: Literal["pre"] = "pre"
    position: Literal["learned", "rotary"] = "rotary"
    conv_width: int = 4  # tokens that the convolution before the attention spans; 0 = no convolution

    def __post_init__(self):
        super().__post_init__()
        self.check_minimums(conv_width=0)


class SwiGLU(nnx.Module):
    """(SiLU(x W) * (x V)) W_2. Source: Shazeer, arXiv 2002.05202, equation 6, with biases."""

    def __init__(self, width: int, ff_width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.ff_width = ff_width
        gate_up = nnx.LinearGeneral(width, (2, ff_width), kernel_init=init, rngs=rngs)
        self.gate_up = named(gate_up, "width", 2, "ff_width")
        self.down = named(Dense(ff_width, width, kernel_init=init, rngs=rngs), "ff_width", "width")

    def __call__(self, x, ctx: Context):
        """Returns (y, None): there is no penalty."""
        kernel_D2F = self.gate_up.kernel[...]
        is_split = kernel_D2F.shape[-1] < self.ff_width  # channels are sharded over the mesh axis "model"
        x_TD = x.reshape(-1, x.shape[-1])
        both = dense(to_parts(x_TD) if is_split else x_TD, kernel_D2F, self.gate_up.bias[...])
        gate_TF, up_TF = jnp.split(both, 2, axis=-1)
        return join(self.down, jax.nn.silu(gate_TF) * up_TF, is_split).reshape(x.shape), None


class LiGRBlock(Block):
    """x + sigmoid(x W) * f(norm(x)), first with attention as f, then with the feed-forward. The input of the
    attention is norm(x) plus its short convolution.

    Source: Borisyuk et al., arXiv 2502.03417, section 3: residual layers with learned gates. The convolution:
    Primer, So et al., NeurIPS'21 (arXiv 2109.08668). Differs: it comes before the projections, and is added.
    """

    def __init__(self, shape: TransformerShape, conv_width: int, *, rngs: nnx.Rngs):
        width, init = shape.width, nnx.initializers.xavier_uniform()
        self.attention_norm = shape.make_norm()
        self.conv = CausalConv(width, conv_width, rngs=rngs) if conv_width else None
        self.attention = shape.make_attention(rngs)
        self.attention_gate = named(Dense(width, width, kernel_init=init, rngs=rngs), "width", "width")
        self.ff_norm = shape.make_norm()
        if shape.mixture:
            self.ff = shape.make_experts(rngs, is_gated=True)
        else:
            self.ff = SwiGLU(width, shape.ff_width, rngs=rngs)
        self.ff_gate = named(Dense(width, width, kernel_init=init, rngs=rngs), "width", "width")
        self.dropout_rate = shape.dropout

    def apply(self, x_BSD, ctx: Context, mix):
        def add(x, y, gate, place):
            y = y * jax.nn.sigmoid(gate(x.reshape(-1, x.shape[-1]))).reshape(x.shape)
            return x + ctx.dropout(y, ctx.site(place, of=2), self.dropout_rate)

        normed = self.attention_norm(x_BSD)
        if self.conv is not None:
            normed += mix(self.conv, normed)
        x = ctx.only(add(x_BSD, self.attention(normed, normed, ctx, mix), self.attention_gate, 1))
        y, penalty_B = self.ff(self.ff_norm(x), ctx)
        return add(x, y, self.ff_gate, 2), penalty_B


class ESASRec(SASRec):
    """SASRec with LiGR blocks.

    Source: Tikhonovich et al., "eSASRec: Enhancing Transformer-based Recommendations in a Modular Fashion",
    RecSys'25 (arXiv 2508.06450). Differs: as `SASRec` does from its paper; rotary positions and a short
    convolution before the attention, which score better (LOG.md, 2026-11-27); the config chooses the loss.
    """

    def make_block(self, rngs: nnx.Rngs) -> Block:
        shape = self.config.block_shape(self.is_causal)
        return LiGRBlock(shape, self.config.conv_width, rngs=rngs)
