"""Tables with spare entries: these are never drawn, scored or listed, and growing does not compile again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_runs import COUNTS, LOSSES, NO_LAYERS, NUM_ITEMS, initial_params, make, make_batch, make_config

from rec_jax.mesh import MeshConfig, make_mesh, place_batch
from rec_jax.objectives.catalogue import Catalogue
from rec_jax.objectives.negatives import make_prior, make_sampler
from rec_jax.objectives.softmax import naive_softmax_cross_entropy
from rec_jax.tables.exchange import Placement
from rec_jax.tables.layouts import RowSharded


def batch_of(num_items):
    """A batch whose ids are at most `num_items`."""
    batch = make_batch()
    items, targets = (np.where(ids > 0, (ids - 1) % num_items + 1, 0) for ids in (batch.items, batch.targets))
    return batch.with_items(items).with_targets(targets)


def set_num_items(step, loss, num_items):
    step.fixed = dataclasses.replace(step.fixed, prior=make_prior(loss, COUNTS, num_items))


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_spare_entries_are_never_drawn(kind):
    sampler, expected = make_sampler(kind, COUNTS, 30), make_sampler(kind, COUNTS[:31])
    drawn = np.asarray(sampler.draw(jnp.arange(50, dtype=jnp.uint32), (400,)))
    assert drawn.min() == 1 and drawn.max() == 30
    ids = np.arange(1, 31)
    np.testing.assert_allclose(sampler.log_prob(ids), expected.log_prob(ids), rtol=1e-6)
    assert np.all(sampler.log_prob(np.arange(31, NUM_ITEMS + 1)) == -np.inf)


@pytest.mark.parametrize("fields", [{}, {"devices": 2, "model_axis": 4, "layout": "rows", "micro_rows": 4}])
def test_growing_compiles_once_and_does_not_update_spare_entries(fields):
    config, options = make_config("softmax", model=NO_LAYERS, **fields)
    step, params = make(config, **options), initial_params(config.model)
    state = step.init(params)
    for num_items in (30, 35, NUM_ITEMS):
        batch = batch_of(num_items)
        set_num_items(step, config.loss, num_items)
        before = jax.device_get(step.tables.unplace(state.params))
        state, metrics = step(state, place_batch(batch, step.mesh))
        after = jax.device_get(step.tables.unplace(state.params))
        spare = slice(num_items + 1, None)
        np.testing.assert_array_equal(after["items"]["embedding"][spare], before["items"]["embedding"][spare])
        assert np.isfinite(metrics["loss"][0])
    assert step._jitted._cache_size() == 1


def test_the_loss_equals_that_of_a_table_without_spare_entries():
    rng = np.random.default_rng(0)
    x_TD, table_VD = (
        rng.normal(size=(6, 4)).astype(np.float32),
        rng.normal(size=(NUM_ITEMS + 1, 4)).astype(np.float32),
    )
    targets_T, weights_T = np.arange(1, 7), np.ones(6, np.float32)
    prior = make_prior(LOSSES["softmax"], COUNTS, 30)
    loss = Catalogue(jnp.asarray(table_VD)).cross_entropy(x_TD, targets_T, weights_T, prior.bias_V)
    expected = naive_softmax_cross_entropy(x_TD, table_VD[:31], targets_T, weights_T)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_ranks_and_top_k_ignore_spare_entries(is_sharded):
    rng = np.random.default_rng(1)
    x_BD, table_VD = (
        rng.normal(size=(5, 4)).astype(np.float32),
        rng.normal(size=(NUM_ITEMS + 1, 4)).astype(np.float32),
    )
    targets_B, no_history = np.arange(1, 6), (np.full(1, 5, np.int32), np.zeros(1, np.int32))
    expected = Catalogue(jnp.asarray(table_VD[:31])).scores(x_BD)
    if is_sharded:
        mesh = make_mesh(MeshConfig(data=2, model=4))
        array = RowSharded(NUM_ITEMS + 1, mesh).place(jnp.asarray(table_VD))
        catalogue = Catalogue(array, Placement(NUM_ITEMS + 1), mesh, jnp.int32(30))
    else:
        catalogue = Catalogue(jnp.asarray(table_VD), num_items=jnp.int32(30))
    scores = catalogue.scores(x_BD)
    for ours, theirs in zip(
        jax.tree.leaves(scores.rank(targets_B, no_history, top_k=10)),
        jax.tree.leaves(expected.rank(targets_B, no_history, top_k=10)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(scores.top_k(10)[1], expected.top_k(10)[1])
