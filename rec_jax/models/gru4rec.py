"""GRU4Rec: gated recurrent units over packed histories."""

from dataclasses import dataclass
from typing import Literal

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.data.batch import Batch
from rec_jax.models.base import SequenceConfig, SequenceModel
from rec_jax.nn.dense import Dense, dense
from rec_jax.nn.dropout import dropout
from rec_jax.tables.embedding import Embedding

# Of variance 1 / inputs, however many gates a kernel holds side by side.
_INIT = nnx.initializers.lecun_normal()


@dataclass(frozen=True, kw_only=True)
class GRU4RecConfig(SequenceConfig):
    type: Literal["gru4rec"] = "gru4rec"
    num_layers: int = 1
    hidden_width: int = 0  # of the states, projected to width at the end if it differs; 0 = width

    def __post_init__(self):
        super().__post_init__()
        self.at_least(num_layers=1, hidden_width=0)


class GRU(nnx.Module):
    """One layer of gated recurrent units, whose state is zero at the first token of a segment.

    Source: Cho et al., EMNLP'14 (arXiv 1406.1078), section 2.3; with z the share of the new state, as in
    Hidasi et al., section 3.
    Differs: the reset gate scales the product with the state instead of the state, so that one product
    serves all gates of a step.
    """

    def __init__(self, width: int, hidden_width: int, *, rngs: nnx.Rngs):
        gates = 3 * hidden_width
        self.inputs = Dense(width, gates, kernel_init=_INIT, rngs=rngs)
        self.state = nnx.Linear(hidden_width, gates, use_bias=False, kernel_init=_INIT, rngs=rngs)

    def __call__(self, x_BSD, is_first_BS):
        """h_BSH. is_first_BS: bool, where the state is zero before the token. The state is f32."""
        batch, length, width = x_BSD.shape
        kernel_HG = self.state.kernel[...]
        x_BSG = self.inputs(x_BSD.reshape(-1, width)).reshape(batch, length, -1)

        def step(h_BH, token):
            x_BG, is_first_B = token
            h_BH = jnp.where(is_first_B[:, None], 0, h_BH)
            from_state = jnp.split(dense(h_BH.astype(x_BG.dtype), kernel_HG).astype(jnp.float32), 3, -1)
            from_input = jnp.split(x_BG.astype(jnp.float32), 3, -1)
            z, r = (nnx.sigmoid(x + h) for x, h in zip(from_input[:2], from_state[:2], strict=True))
            new_BH = jnp.tanh(from_input[2] + r * from_state[2])
            h_BH = (1 - z) * h_BH + z * new_BH
            return h_BH, h_BH.astype(x_BG.dtype)

        before_BH = jnp.zeros((batch, x_BSG.shape[-1] // 3), jnp.float32)
        _, h_SBH = jax.lax.scan(step, before_BH, (x_BSG.swapaxes(0, 1), is_first_BS.swapaxes(0, 1)))
        return h_SBH.swapaxes(0, 1)


class GRU4Rec(SequenceModel):
    """Gated recurrent units with the tied item table.

    Source: Hidasi et al., ICLR'16 (arXiv 1511.06939); Hidasi & Karatzoglou, CIKM'18 (arXiv 1706.03847).
    Differs: one table for inputs and scores (`constrained_embedding` in the authors' code), without a bias
    for each item; the losses of this project instead of TOP1 and BPR-max; learns from all positions of packed
    rows at once, with gradients through the whole history, instead of session-parallel batches of one step.
    """

    def __init__(self, config: GRU4RecConfig, num_items: int, max_len: int, *, rngs: nnx.Rngs):
        """max_len: any length will do."""
        self.config = config
        hidden_width = config.hidden_width or config.width
        widths = [config.width] + [hidden_width] * (config.num_layers - 1)
        self.items = Embedding(num_items + 1, config.width, rngs=rngs)
        self.layers = nnx.List([GRU(width, hidden_width, rngs=rngs) for width in widths])
        if hidden_width != config.width:
            self.project = Dense(hidden_width, config.width, kernel_init=_INIT, rngs=rngs)

    def __call__(
        self,
        batch: Batch,
        key_B: jax.Array | None = None,
        at=None,
        hidden: list | None = None,
        penalties: list | None = None,
    ) -> jax.Array:
        """See SequenceModel."""
        config = self.config
        is_first_BS = batch.positions == 0
        x = self.items(batch.place("items", "events", batch.items)) * config.width**0.5
        for index, layer in enumerate(self.layers):
            if key_B is not None and config.dropout:
                x = dropout(x, key_B, index, config.dropout)
            x = layer(x, is_first_BS)
            if at is not None and index == config.num_layers - 1:
                x = x[at]
            if hidden is not None:
                hidden.append(x)
        if config.hidden_width not in (0, config.width):
            x = self.project(x.reshape(-1, config.hidden_width)).reshape(*x.shape[:-1], config.width)
        return self.queries(x)
