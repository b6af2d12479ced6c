"""Initial values of large tables."""

import jax
import jax.numpy as jnp

_SLICE_ELEMENTS = 2**24


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
