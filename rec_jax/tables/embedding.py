"""Embedding tables: module(ids) reads rows."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

_SLICE_ELEMENTS = 2**24
_NORMAL = nnx.initializers.normal(0.02)


def sliced(init):
    """An initializer that draws a large table in slices of rows, for drawing needs several times the room of
    what is drawn. Tables of one slice are drawn as `init` does."""

    def draw(key, shape, dtype, *args, **kwargs):
        num_rows, dim = shape
        rows = max(1, _SLICE_ELEMENTS // dim)
        if num_rows <= rows:
            return init(key, shape, dtype, *args, **kwargs)
        keys = jax.random.split(key, -(-num_rows // rows))

        def fill(i, table):  # the last slice is moved back inside the table
            values = init(keys[i], (rows, dim), dtype, *args, **kwargs)
            return jax.lax.dynamic_update_slice(table, values, (jnp.minimum(i * rows, num_rows - rows), 0))

        return jax.lax.fori_loop(0, len(keys), fill, jnp.zeros(shape, dtype))

    return draw


class Embedding(nnx.Module):
    """A table `embedding` [num_rows, dim]. An id outside [0, num_rows) reads as a row of NaN, so that the
    loss shows it; a negative one does not count from the end."""

    def __init__(self, num_rows: int, dim: int, *, init=_NORMAL, rngs: nnx.Rngs):
        self.embedding = nnx.Param(sliced(init)(rngs.params(), (num_rows, dim), jnp.float32))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids: integers [...]. Returns rows [..., dim]."""
        table_VD = self.embedding[...]
        if not isinstance(table_VD, jax.Array):  # of a compressed model
            return table_VD.rows(ids)
        return table_VD.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
