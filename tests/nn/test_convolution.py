import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np

from rec_jax.nn.context import Context
from rec_jax.nn.convolution import CausalConv


def test_convolution_by_hand():
    """A row with two segments, and a row shorter than the kernel."""
    conv = CausalConv(1, 4, rngs=nnx.Rngs(0))
    conv.taps[...] = jnp.array([[1.0], [10.0], [100.0], [1000.0]])
    conv.bias[...] = jnp.array([0.5])
    y = conv(jnp.array([[[1.0], [2.0], [3.0], [4.0], [5.0]]]), Context(jnp.array([[0, 1, 2, 0, 1]])))
    np.testing.assert_array_equal(y[0, :, 0], [1.5, 12.5, 123.5, 4.5, 45.5])
    y = conv(jnp.array([[[1.0], [2.0]]]), Context(jnp.array([[0, 1]])))
    np.testing.assert_array_equal(y[0, :, 0], [1.5, 12.5])
