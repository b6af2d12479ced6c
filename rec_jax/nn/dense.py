"""Dense layers whose kernel is an array, or an object with its own matrix product (quantized, low rank)."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp


def dense(x_TD, kernel, bias_F=None):
    """Returns y_TF = x @ kernel + bias.

    kernel: an array [D, ...], whose dims after the first are flattened; or, in a compressed model, an object
    with a `shape` and a method `matmul(x_TD)`.
    """
    if isinstance(kernel, jax.Array):
        y_TF = jnp.dot(x_TD, kernel.reshape(kernel.shape[0], -1).astype(x_TD.dtype))
    else:
        y_TF = kernel.matmul(x_TD)
    return y_TF if bias_F is None else y_TF + bias_F.reshape(-1)


def dense_each(x_ETD, kernel_EDF):
    """Returns y_ETF: x[e] @ kernel[e] for each expert e. kernel_EDF: an array, or an object that
    kernel_EDF[e] makes a kernel of `dense`."""
    if isinstance(kernel_EDF, jax.Array):
        return jnp.einsum("etd,edf->etf", x_ETD, kernel_EDF)
    return jnp.stack([kernel_EDF[e].matmul(x_TD) for e, x_TD in enumerate(x_ETD)])


class Dense(nnx.Linear):
    """nnx.Linear computed by `dense`, so that its kernel may be compressed."""

    def __call__(self, x_TD):
        return dense(x_TD, self.kernel[...], self.bias[...])
