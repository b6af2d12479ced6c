"""Short convolutions along packed rows."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp


class CausalConv(nnx.Module):
    """Each channel's own weighted sum of a token and those before it in its segment, with a bias.

    taps: [W, D], that of the token itself first.
    """

    def __init__(self, width: int, conv_width: int, *, rngs: nnx.Rngs):
        taps = jax.random.normal(rngs.params(), (conv_width, width)) * conv_width**-0.5
        self.taps, self.bias = nnx.Param(taps), nnx.Param(jnp.zeros(width))

    def __call__(self, x_BSD, positions_BS):
        """positions_BS: int32, of each token in its segment, so how many tokens there are before it."""
        taps_WD = self.taps[...]
        y_BSD = x_BSD * taps_WD[0] + self.bias[...]
        for back in range(1, min(len(taps_WD), x_BSD.shape[1])):
            earlier = jnp.pad(x_BSD[:, :-back], ((0, 0), (back, 0), (0, 0)))
            y_BSD += jnp.where(positions_BS[..., None] >= back, earlier, 0) * taps_WD[back]
        return y_BSD
