"""Dense layers whose kernel may be more than an array."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp


def dense(x_TD, kernel, bias_F=None):
    """x @ kernel + bias.

    kernel: an array [D, ...], whose further dims are flattened; or, from a compressed model, an object with a
    `shape` and `matmul(x_TD)`, which knows how to multiply itself. Returns y_TF.
    """
    if isinstance(kernel, jax.Array):
        y_TF = jnp.dot(x_TD, kernel.reshape(kernel.shape[0], -1).astype(x_TD.dtype))
    else:
        y_TF = kernel.matmul(x_TD)
    return y_TF if bias_F is None else y_TF + bias_F.reshape(-1)


def dense_each(x_ETD, kernel_EDF):
    """x[e] @ kernel[e] for each of several experts, [E, T, F]. kernel_EDF: an array, or an object as of
    `dense`, whose part for expert e is kernel_EDF[e]."""
    if isinstance(kernel_EDF, jax.Array):
        return jnp.einsum("etd,edf->etf", x_ETD, kernel_EDF)
    return jnp.stack([kernel_EDF[e].matmul(x_TD) for e, x_TD in enumerate(x_ETD)])


class Dense(nnx.Linear):
    """nnx.Linear by `dense`."""

    def __call__(self, x_TD):
        return dense(x_TD, self.kernel[...], self.bias[...])
