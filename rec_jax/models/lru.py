"""LRURec: a sequence model with gated linear recurrent units instead of attention.

It has the usual parts of a model: a config, a block, and the model itself.
"""

from dataclasses import dataclass
from typing import Literal

import flax.nnx as nnx
import jax.numpy as jnp

from rec_jax.models.base import SequenceConfig, SequenceModel
from rec_jax.nn.blocks import FeedForward
from rec_jax.nn.context import Block, Context
from rec_jax.nn.convolution import CausalConv
from rec_jax.nn.dense import Dense
from rec_jax.nn.dims import named
from rec_jax.nn.norm import LayerNorm
from rec_jax.nn.recurrence import LinearRecurrence
from rec_jax.tables.embedding import Embedding

DECAY_POWER = 8  # c of the paper
# Initial decays of the first and the last channel: the share of a state that is left after one token when the
# gate is fully open. Gates start half open, so that states last for 3 to 200 tokens.
FIRST_DECAYS = (0.5, 0.99)

# Weights have variance 1 / inputs, also where one kernel holds the outputs of two layers.
_INIT = nnx.initializers.lecun_normal()


@dataclass(frozen=True, kw_only=True)
class LRUConfig(SequenceConfig):
    type: Literal["lru"] = "lru"
    ff_width: int = 64
    conv_width: int = 4  # tokens that the convolution before the recurrence spans; 0 = no convolution

    def __post_init__(self):
        super().__post_init__()
        self.check_minimums(ff_width=1, conv_width=0)


class GatedRecurrence(nnx.Module):
    """A linear recurrence with gated decays and gated inputs, multiplied by a GeLU branch.

    With x the input of the recurrence: r = sigmoid(W_a x), i = sigmoid(W_x x), a = exp(-c softplus(L) r),
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t). At the first token of a segment, h_t = i_t x_t.

    Source: Griffin, De et al., arXiv 2402.19427, sections 2.3 and 2.4.
    Differs: the width is not expanded; initial decays (a at r = 1) are evenly spaced over FIRST_DECAYS
    instead of drawn from 0.9 to 0.999, because histories have tens of events.
    """

    def __init__(self, width: int, conv_width: int, *, rngs: nnx.Rngs):
        branches = Dense(width, 2 * width, kernel_init=_INIT, rngs=rngs)
        self.branches = named(branches, "width", (2, "width"))
        self.conv = CausalConv(width, conv_width, rngs=rngs) if conv_width else None
        gates = Dense(width, 2 * width, kernel_init=_INIT, rngs=rngs)
        self.gates = named(gates, "width", (2, "width"))
        rate_D = -jnp.log(jnp.linspace(*FIRST_DECAYS, width)) / DECAY_POWER
        self.rate = named(nnx.Param(jnp.log(jnp.expm1(rate_D))), "width")  # L, before its softplus
        self.out = named(Dense(width, width, kernel_init=_INIT, rngs=rngs), "width", "width")

    def __call__(self, x_BSD, ctx: Context, mix):
        """Returns y_BSD. mix: see `nn.context.Block`."""
        shape = x_BSD.shape
        branch_TD, x_TD = jnp.split(self.branches(x_BSD.reshape(-1, shape[-1])), 2, -1)
        if self.conv is not None:
            x_TD = mix(self.conv, x_TD.reshape(shape)).reshape(x_TD.shape)
        r_TD, i_TD = jnp.split(nnx.sigmoid(self.gates(x_TD).astype(jnp.float32)), 2, -1)
        log_a = -DECAY_POWER * nnx.softplus(self.rate[...].astype(jnp.float32)) * r_TD
        is_first = ctx.positions.reshape(-1, 1) == 0
        change = jnp.expm1(log_a)  # a - 1, exact for a near 1
        a_TD = jnp.where(is_first, 0, 1 + change)
        # sqrt(1 - a^2); 1 - a^2 is kept above 0, where the square root has no gradient.
        scale = jnp.where(is_first, 1, jnp.sqrt(jnp.maximum(-change * (2 + change), 1e-12)))
        input_TD = scale * i_TD * x_TD.astype(jnp.float32)
        h_BSD = mix(LinearRecurrence(), a_TD.reshape(shape), input_TD.reshape(shape))
        h_TD = h_BSD.reshape(x_TD.shape).astype(x_TD.dtype)
        return self.out(nnx.gelu(branch_TD) * h_TD).reshape(shape)


class LRUBlock(Block):
    """A recurrence, then a feed-forward, each as x + f(norm(x)).

    As in Griffin, residuals are summed without a scale, whatever the number of layers.
    """

    def __init__(self, config: LRUConfig, *, rngs: nnx.Rngs):
        self.recurrence_norm = LayerNorm(config.width, config.full_width)
        self.recurrence = GatedRecurrence(config.width, config.conv_width, rngs=rngs)
        self.ff_norm = LayerNorm(config.width, config.full_width)
        self.ff = FeedForward(config.width, config.ff_width, "gelu", rngs=rngs)
        self.dropout_rate = config.dropout

    def apply(self, x_BSD, ctx: Context, mix):
        y_BSD = self.recurrence(self.recurrence_norm(x_BSD), ctx, mix)
        x = ctx.only(x_BSD + ctx.dropout(y_BSD, ctx.site(1, of=2), self.dropout_rate))
        y, _ = self.ff(self.ff_norm(x), ctx)
        return x + ctx.dropout(y, ctx.site(2, of=2), self.dropout_rate), None


class LRURec(SequenceModel):
    """Gated linear recurrent units, with one item embedding table for inputs and scores. There are no
    position embeddings, because a recurrence depends on the order of its tokens.

    Recommenders with a linear recurrence instead of attention: LRURec, Yue et al., WSDM'24 (arXiv
    2310.02367); Mamba4Rec, Liu et al., arXiv 2403.03900.
    Source: the recurrent blocks of Griffin, De et al., arXiv 2402.19427.
    Differs from LRURec: decays are real and depend on the input, instead of complex and constant; a short
    convolution and a gating branch, as in Mamba4Rec; norms before the layers. Differs from Griffin: no local
    attention, LayerNorm instead of RMSNorm, a feed-forward without a gate.
    """

    def __init__(self, config: LRUConfig, num_items: int, max_len: int, *, rngs: nnx.Rngs):
        """max_len: not used, because histories may have any length."""
        self.config = config
        self.items = named(Embedding(num_items + 1, config.width, rngs=rngs), "items", "width")
        self.blocks = nnx.List([LRUBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = LayerNorm(config.width, config.full_width)
