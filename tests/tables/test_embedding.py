"""Embedding tables against flax.nnx.Embed."""

import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.tables import embedding
from rec_jax.tables.embedding import Embedding

V, D = 7, 3
NORMAL = nnx.initializers.normal(0.02)


def test_slices_are_independent_draws_of_the_same_distribution(monkeypatch):
    init = jax.nn.initializers.normal(0.5)
    whole = init(jax.random.key(0), (1000, 8), jnp.float32)
    np.testing.assert_array_equal(embedding.sliced(init)(jax.random.key(0), (1000, 8), jnp.float32), whole)
    monkeypatch.setattr(embedding, "_SLICE_ELEMENTS", 8 * 300)
    table = np.asarray(embedding.sliced(init)(jax.random.key(0), (1000, 8), jnp.float32))
    assert table.shape == (1000, 8) and len(np.unique(table[:, 0])) == 1000
    assert abs(table.mean()) < 4 * 0.5 / np.sqrt(8000) and abs(table.std() - 0.5) < 0.02


def test_initial_values_equal_nnx_embed_to_the_bit(monkeypatch):
    monkeypatch.setattr(embedding, "_SLICE_ELEMENTS", 80)  # four slices

    def ours(rngs):
        return Embedding(40, 8, rngs=rngs)

    def theirs(rngs):
        return nnx.Embed(40, 8, embedding_init=embedding.sliced(NORMAL), rngs=rngs)

    def drawn(build):
        return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(build(nnx.Rngs(params=key)))))(
            jax.random.key(3)
        )

    jax.tree.map(np.testing.assert_array_equal, drawn(ours), drawn(theirs))


def lookup(module, ids, weights=0.0):
    """Returns (vectors, gradient of their weighted sum with respect to the table)."""
    graphdef, state = nnx.split(module, nnx.Param)

    @functools.partial(jax.grad, has_aux=True)
    def loss(params, ids):
        vectors = nnx.merge(graphdef, nnx.State(params))(ids)
        return jnp.sum(vectors * weights), vectors

    grads, vectors = jax.jit(loss)(nnx.to_pure_dict(state), np.asarray(ids, np.int32))
    return np.asarray(vectors), np.asarray(grads["embedding"])


def test_lookup_and_gradient_equal_nnx_embed():
    ids, weights = [[0, 6, 2], [2, 2, 5]], np.arange(18.0).reshape(2, 3, D)
    ours, theirs = Embedding(V, D, rngs=nnx.Rngs(0)), nnx.Embed(V, D, embedding_init=NORMAL, rngs=nnx.Rngs(0))
    for value, expected in zip(lookup(ours, ids, weights), lookup(theirs, ids, weights), strict=True):
        np.testing.assert_array_equal(value, expected)
    assert lookup(ours, np.zeros((2, 0)))[0].shape == (2, 0, D)


@pytest.mark.parametrize("num_rows", [1, V])
def test_invalid_ids_read_as_nan_and_get_no_gradient(num_rows):
    module = Embedding(num_rows, D, rngs=nnx.Rngs(0))
    vectors, grads = lookup(module, [-1, num_rows, -(2**31), 2**31 - 1, -num_rows, 0], weights=1.0)
    assert np.isnan(vectors[:-1]).all() and not np.isnan(vectors[-1]).any()
    np.testing.assert_array_equal(grads, np.eye(num_rows)[0][:, None] * np.ones(D))
