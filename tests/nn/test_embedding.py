import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.nn import embedding


def test_slices_are_independent_draws_of_the_same_distribution(monkeypatch):
    init = jax.nn.initializers.normal(0.5)
    whole = init(jax.random.key(0), (1000, 8), jnp.float32)
    np.testing.assert_array_equal(embedding.sliced(init)(jax.random.key(0), (1000, 8), jnp.float32), whole)
    monkeypatch.setattr(embedding, "_SLICE_ELEMENTS", 8 * 300)
    table = np.asarray(embedding.sliced(init)(jax.random.key(0), (1000, 8), jnp.float32))
    assert table.shape == (1000, 8) and len(np.unique(table[:, 0])) == 1000
    assert abs(table.mean()) < 4 * 0.5 / np.sqrt(8000) and abs(table.std() - 0.5) < 0.02
