"""Short convolutions along packed rows."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.nn.context import Context
from rec_jax.nn.dims import named


class CausalConv(nnx.Module):
    """A mixer (`nn.context`) that convolves each channel over a token and the W - 1 tokens before it in its
    segment, and adds a bias.

    taps: [W, D], weights by distance; those of the token itself come first.
    """

    def __init__(self, width: int, conv_width: int, *, rngs: nnx.Rngs):
        taps = jax.random.normal(rngs.params(), (conv_width, width)) * conv_width**-0.5
        self.taps = named(nnx.Param(taps), None, "width")
        self.bias = named(nnx.Param(jnp.zeros(width)), "width")

    def __call__(self, x_BSD, ctx: Context):
        taps_WD = self.taps[...]
        y_BSD = x_BSD * taps_WD[0] + self.bias[...]
        for back in range(1, min(len(taps_WD), x_BSD.shape[1])):
            earlier = jnp.pad(x_BSD[:, :-back], ((0, 0), (back, 0), (0, 0)))
            y_BSD += jnp.where(ctx.positions[..., None] >= back, earlier, 0) * taps_WD[back]
        return y_BSD

    def prefill(self, x_BSD, ctx: Context, query_positions):
        """The suffix is the last inputs [N, 1, W - 1, D], the latest first; 0 before a history starts."""
        rows_N, columns_N = query_positions
        back_W = jnp.arange(self.taps.shape[0] - 1)
        last_NWD = x_BSD[rows_N[:, None], jnp.maximum(columns_N[:, None] - back_W, 0)]
        is_inside_NW = ctx.positions[query_positions][:, None] >= back_W
        return self(x_BSD, ctx), None, jnp.where(is_inside_NW[..., None], last_NWD, 0)[:, None]

    def step(self, x_BKD, prefix, suffix, ctx: Context):
        last_BKWD = jnp.concatenate(
            [x_BKD[:, :, None], jnp.broadcast_to(suffix, (*x_BKD.shape[:2], *suffix.shape[2:]))], axis=2
        )
        return jnp.sum(last_BKWD * self.taps[...], axis=2) + self.bias[...], last_BKWD[:, :, :-1]
