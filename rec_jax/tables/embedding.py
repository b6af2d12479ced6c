"""Embedding tables as modules: `module(ids)` looks up entries."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

_SLICE_ELEMENTS = 2**24
_NORMAL = nnx.initializers.normal(0.02)


def sliced(init):
    """Returns an initializer that draws a large table in slices of rows, because drawing takes several times
    the memory of its result. A table of one slice is drawn by `init` itself."""

    def draw(key, shape, dtype, *args, **kwargs):
        num_rows, dim = shape
        slice_rows = max(1, _SLICE_ELEMENTS // dim)
        if num_rows <= slice_rows:
            return init(key, shape, dtype, *args, **kwargs)
        keys = jax.random.split(key, -(-num_rows // slice_rows))
        last = num_rows - slice_rows

        def fill(i, table):  # the last slice starts earlier, to end with the table
            values = init(keys[i], (slice_rows, dim), dtype, *args, **kwargs)
            return jax.lax.dynamic_update_slice(table, values, (jnp.minimum(i * slice_rows, last), 0))

        return jax.lax.fori_loop(0, len(keys), fill, jnp.zeros(shape, dtype))

    return draw


class Embedding(nnx.Module):
    """An embedding table [num_rows, dim]. An id outside [0, num_rows), negative ones included, reads as NaN,
    so that the loss shows the mistake."""

    def __init__(self, num_rows: int, dim: int, *, init=_NORMAL, rngs: nnx.Rngs):
        self.embedding = nnx.Param(sliced(init)(rngs.params(), (num_rows, dim), jnp.float32))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns entries [..., dim] for integer ids [...]."""
        table_VD = self.embedding[...]
        if not isinstance(table_VD, jax.Array):  # in a compressed model
            return table_VD.look_up(ids)
        return table_VD.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
