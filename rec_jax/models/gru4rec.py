"""GRU4Rec: gated recurrent units over packed histories."""

from dataclasses import dataclass
from typing import Literal

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.hashing import dropout_site
from rec_jax.models.base import SequenceConfig, SequenceModel
from rec_jax.nn.context import Block, Context
from rec_jax.nn.dense import Dense, dense
from rec_jax.nn.dims import named
from rec_jax.tables.embedding import Embedding

# Weights have variance 1 / inputs, although one kernel holds the outputs of three gates.
_INIT = nnx.initializers.lecun_normal()


@dataclass(frozen=True, kw_only=True)
class GRU4RecConfig(SequenceConfig):
    type: Literal["gru4rec"] = "gru4rec"
    num_layers: int = 1
    hidden_width: int = 0  # dims of a state, projected to width after the last layer; 0 = width

    def __post_init__(self):
        super().__post_init__()
        self.check_minimums(num_layers=1, hidden_width=0)

    @property
    def fixed_layers(self) -> str:
        return "a layer replaces its input"


@dataclass(frozen=True)
class Gates:
    """The recurrence of a GRU as a mixer (`nn.context`). Its input is the gates' share of the token, x W + b;
    the suffix of its cache is the state, f32.

    Source: Cho et al., EMNLP'14 (arXiv 1406.1078), section 2.3; z is the share of the new state, as in Hidasi
    et al., section 3.
    Differs: the reset gate scales the state's product with its kernel instead of the state, so that one
    matrix product serves all gates of a step.
    """

    kernel_HG: jax.Array

    def next(self, h_BH, x_BG, is_first_B):
        """Returns the state after a token. The state before the first token of a segment is zero."""
        h_BH = jnp.where(is_first_B[:, None], 0, h_BH)
        from_state = jnp.split(dense(h_BH.astype(x_BG.dtype), self.kernel_HG).astype(jnp.float32), 3, -1)
        from_input = jnp.split(x_BG.astype(jnp.float32), 3, -1)
        z, r = (nnx.sigmoid(x + h) for x, h in zip(from_input[:2], from_state[:2], strict=True))
        new_BH = jnp.tanh(from_input[2] + r * from_state[2])
        return (1 - z) * h_BH + z * new_BH

    def states(self, x_BSG, ctx: Context, dtype):
        """Returns the states at all tokens, h_BSH, as `dtype`; they are computed in f32."""
        is_first_BS = ctx.positions == 0

        def step(h_BH, token):
            h_BH = self.next(h_BH, *token)
            return h_BH, h_BH.astype(dtype)

        initial_BH = jnp.zeros((len(x_BSG), x_BSG.shape[-1] // 3), jnp.float32)
        tokens = x_BSG.swapaxes(0, 1), is_first_BS.swapaxes(0, 1)
        return jax.lax.scan(step, initial_BH, tokens)[1].swapaxes(0, 1)

    def __call__(self, x_BSG, ctx: Context):
        return self.states(x_BSG, ctx, x_BSG.dtype)

    def prefill(self, x_BSG, ctx: Context, query_positions):
        h_BSH = self.states(x_BSG, ctx, jnp.float32)
        return h_BSH.astype(x_BSG.dtype), None, h_BSH[query_positions][:, None]

    def step(self, x_BKG, prefix, suffix, ctx: Context):
        suffix = jnp.broadcast_to(suffix, (*x_BKG.shape[:2], suffix.shape[-1]))
        is_first_T = ctx.positions.reshape(-1) == 0
        h_TH = self.next(suffix.reshape(-1, suffix.shape[-1]), x_BKG.reshape(-1, x_BKG.shape[-1]), is_first_T)
        h_BKH = h_TH.reshape(suffix.shape)
        return h_BKH.astype(x_BKG.dtype), h_BKH


class GRU(Block):
    """One layer of gated recurrent units. The state is zero before the first token of a segment."""

    def __init__(self, width: int, hidden_width: int, dropout_rate: float, dims, *, rngs: nnx.Rngs):
        """dims: names of the dims of sizes width and hidden_width, see `nn.dims`."""
        gates, (dim, hidden) = 3 * hidden_width, dims
        inputs = Dense(width, gates, kernel_init=_INIT, rngs=rngs)
        state = nnx.Linear(hidden_width, gates, use_bias=False, kernel_init=_INIT, rngs=rngs)
        self.inputs, self.state = named(inputs, dim, (3, hidden)), named(state, hidden, (3, hidden))
        self.dropout_rate = dropout_rate

    def apply(self, x_BSD, ctx: Context, mix):
        if ctx.layer:  # dropout has already been applied to the input of the first layer
            x_BSD = ctx.dropout(x_BSD, dropout_site(ctx.layer - 1, 1, 1), self.dropout_rate)
        x_TG = self.inputs(x_BSD.reshape(-1, x_BSD.shape[-1]))
        return ctx.only(mix(Gates(self.state.kernel[...]), x_TG.reshape(*x_BSD.shape[:2], -1))), None


class GRU4Rec(SequenceModel):
    """Gated recurrent units, with one item embedding table for inputs and scores.

    Source: Hidasi et al., ICLR'16 (arXiv 1511.06939); Hidasi & Karatzoglou, CIKM'18 (arXiv 1706.03847).
    Differs: one table (`constrained_embedding` in the authors' code), without item biases; the losses of this
    project instead of TOP1 and BPR-max; trained on all tokens of packed rows at once, with gradients through
    the whole history, instead of session-parallel batches of one step.
    """

    def __init__(self, config: GRU4RecConfig, num_items: int, max_len: int, *, rngs: nnx.Rngs):
        """max_len: not used, because histories may have any length."""
        self.config = config
        hidden_width = config.hidden_width or config.width
        self.items = named(Embedding(num_items + 1, config.width, rngs=rngs), "items", "width")
        hidden = "width" if hidden_width == config.width else "hidden"
        inputs = [(config.width, "width")] + [(hidden_width, hidden)] * (config.num_layers - 1)
        self.layers = nnx.List(
            [GRU(width, hidden_width, config.dropout, (dim, hidden), rngs=rngs) for width, dim in inputs]
        )
        if hidden_width != config.width:
            project = Dense(hidden_width, config.width, kernel_init=_INIT, rngs=rngs)
            self.project = named(project, "hidden", "width")

    @property
    def stack(self) -> list[Block]:
        return list(self.layers)

    def read_out(self, x):
        config = self.config
        if config.hidden_width not in (0, config.width):
            x = self.project(x.reshape(-1, config.hidden_width)).reshape(*x.shape[:-1], config.width)
        return self.queries(x)
