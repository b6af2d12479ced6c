"""Shrunk models against the masked models that they are made from."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.compress.shrink import (
    ShrinkConfig,
    Units,
    choose_units,
    mask,
    shrink,
    shrunk_config,
    unit_masks,
    unit_scores,
)
from rec_jax.compress.work import answer_multiply_adds
from rec_jax.data.batch import Batch
from rec_jax.models.base import define_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.tree import leaf_names, num_params

NUM_ITEMS, MAX_LEN = 30, 10
CONFIG = SASRecConfig(width=12, ff_width=10, num_heads=3, num_layers=2, dropout=0.0)
BATCH = Batch(
    {"item": np.array([[3, 7, 7, 1, 5, 6, 2, 9, 11, 0], range(20, 30)])},
    segments=np.array([[1] * 4 + [2] * 5 + [0], [1] * 10]),
    positions=np.array([[*range(4), *range(5), 0], range(10)]),
)


def build(config):
    return lambda rngs: SASRec(config, NUM_ITEMS, MAX_LEN, rngs=rngs)


@cache
def make(config):
    """Returns (model, params): random NumPy arrays, none of them at its initial value."""
    model, rng = define_model(build(config)), np.random.default_rng(1)
    return model, jax.tree.map(
        lambda x: (0.4 * rng.normal(size=x.shape)).astype(np.float32), model.abstract_params
    )


@partial(jax.jit, static_argnums=0)
def outputs(model, params):
    """Returns (x_TD, scores_TV): the encodings and the scores of the catalogue, at the real tokens."""
    module = model.bind(params)
    x_TD = module(BATCH)[BATCH.segments > 0]
    return x_TD, x_TD @ module.item_vectors().T


def assert_shrinks(config, kept):
    model, params = make(config)
    units = choose_units(model, params, kept)
    small_config, small_params = shrink(model, params, units)
    assert small_config == shrunk_config(config, kept)
    small_model = define_model(build(small_config))
    assert jax.tree.structure(small_model.abstract_params) == jax.tree.structure(small_params)
    masks = unit_masks(model, params, units)
    assert sum(m.sum() for m in jax.tree.leaves(masks)) == num_params(small_params) < num_params(params)
    x_TD, scores_TV = outputs(model, mask(params, masks))
    small_x_TD, small_scores_TV = outputs(small_model, small_params)
    np.testing.assert_allclose(small_scores_TV, scores_TV, rtol=1e-5, atol=1e-5)
    dims = slice(None) if config.item_dim else units.width_D
    np.testing.assert_allclose(small_x_TD, x_TD[:, dims], rtol=1e-5, atol=1e-5)
    assert np.abs(scores_TV - outputs(model, params)[1]).max() > 0.1  # the removed units had an effect
    return units


@pytest.mark.parametrize(
    "norm, position, kept",
    [
        ("post", "learned", {"width": 8, "heads": 1, "ff_width": 4}),
        ("original", "rotary", {"width": 7}),
        ("pre", "rotary", {"num_layers": 1, "width": 6, "heads": 2, "ff_width": 5}),
    ],
)
def test_a_shrunk_model_computes_like_the_masked_model(norm, position, kept):
    assert_shrinks(dataclasses.replace(CONFIG, norm=norm, position=position), ShrinkConfig(**kept))


@pytest.mark.parametrize(
    "options",
    [{"l2_normalize": True, "temperature": 0.1}, {"item_dim": 5, "share_layers": True}],
    ids=str,
)
def test_models_with_other_options_can_be_shrunk(options):
    config = dataclasses.replace(CONFIG, **options)
    units = assert_shrinks(config, ShrinkConfig(heads=1, ff_width=4, width=5))
    assert units.layers_L.shape == (1 if config.share_layers else 2,)


def test_a_shrunk_model_can_be_shrunk_again():
    config, params = CONFIG, make(CONFIG)[1]
    for kept in (ShrinkConfig(heads=2, width=9), ShrinkConfig(ff_width=4, width=6)):
        model = make(config)[0]
        units = choose_units(model, params, kept)
        masked = mask(params, unit_masks(model, params, units))
        scores = outputs(model, masked)[1]
        config, params = shrink(model, params, units)
        small = outputs(make(config)[0], params)[1]
        np.testing.assert_allclose(small, scores, rtol=1e-5, atol=1e-5)
    assert (config.width, config.full_width, config.num_heads, config.head_width) == (6, 12, 2, 4)


def test_keeping_all_units_gives_the_same_model():
    """The config only makes the width of a head explicit, which is the default."""
    model, params = make(CONFIG)
    config, same = shrink(model, params, choose_units(model, params, ShrinkConfig()))
    assert config == dataclasses.replace(CONFIG, head_width=CONFIG.width // CONFIG.num_heads)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_masks_by_hand():
    """One layer of two heads of one dim; dim 0, head 1 and channel 2 are masked."""
    config = SASRecConfig(width=2, ff_width=3, num_heads=2, num_layers=1)
    model, params = make(config)
    off, on = np.array([[False, True]]), np.array([[True, False]])
    units = Units(on, np.array([[True, True, False]]), off[0], np.array([True]))
    masks = leaf_names(unit_masks(model, params, units))
    assert masks["items/embedding"].tolist() == [[False, True]] * (NUM_ITEMS + 1)
    assert masks["final_norm/scale"].tolist() == [False, True]
    assert masks["blocks/0/attention/query/kernel"].tolist() == [[False, False], [True, False]]
    assert masks["blocks/0/attention/key_value/bias"].tolist() == [[True, False]] * 2
    assert masks["blocks/0/attention/out/kernel"].tolist() == [[False, True], [False, False]]
    assert masks["blocks/0/ff/up/kernel"].tolist() == [[False] * 3, [True, True, False]]
    assert masks["blocks/0/ff/down/kernel"].tolist() == [[False, True], [False, True], [False, False]]
    assert masks["blocks/0/ff/down/bias"].tolist() == [False, True]


def test_scores_by_hand():
    """All weights except a few are 0, so that each unit's score is the norm of these few."""
    config = SASRecConfig(width=4, ff_width=3, num_heads=2, num_layers=2)
    model, params = make(config)
    params = jax.tree.map(lambda x: np.zeros(x.shape), params)
    block = params["blocks"][1]
    block["attention"]["query"]["kernel"][2, 3] = 3.0  # dim 2, head 1
    block["attention"]["key_value"]["bias"][1, 2] = -4.0  # head 1
    block["ff"]["up"]["kernel"][0, 1] = 12.0  # dim 0, channel 1
    params["items"]["embedding"][5] = [0, 0, 2, 0]
    scores = unit_scores(model, params)
    np.testing.assert_allclose(scores["heads"], [[0, 0], [0, 5]])
    np.testing.assert_allclose(scores["ff_width"], [[0, 0, 0], [0, 12, 0]])
    np.testing.assert_allclose(scores["num_layers"], [0, 13])
    np.testing.assert_allclose(scores["width"], [12, 0, 13**0.5, 0])

    grads = jax.tree.map(np.zeros_like, params)
    grads["blocks"][1]["attention"]["query"]["kernel"][2, 3] = 1.0
    grads["blocks"][1]["attention"]["key_value"]["bias"][1, 2] = 2.0
    grads["blocks"][1]["ff"]["up"]["kernel"][0] = 0.5
    taylor = unit_scores(model, params, "taylor", grads)
    np.testing.assert_allclose(taylor["heads"], [[0, 0], [0, 5]])  # |3 - 8|
    np.testing.assert_allclose(taylor["ff_width"], [[0, 0, 0], [0, 6, 0]])
    np.testing.assert_allclose(taylor["num_layers"], [0, 1])
    np.testing.assert_allclose(taylor["width"], [6, 0, 3, 0])


def test_taylor_scores_are_the_first_order_change_of_the_loss():
    """Scaling a head by a small share changes the loss by that share of its score. The share is so small that
    few activations switch on or off."""
    model, params = make(dataclasses.replace(CONFIG, num_layers=1))

    @jax.jit
    def loss(params):
        x_TD = outputs(model, params)[0]
        return jnp.sum(x_TD * jnp.cos(jnp.arange(x_TD.size)).reshape(x_TD.shape))

    scores = unit_scores(model, params, "taylor", jax.jit(jax.grad(loss))(params))["heads"]
    share, changes = 0.001, np.zeros(scores.shape)
    all_units = choose_units(model, params, ShrinkConfig())
    for layer, head in np.ndindex(scores.shape):
        heads_LN = np.ones(scores.shape, bool)
        heads_LN[layer, head] = False
        masks = unit_masks(model, params, all_units._replace(heads_LN=heads_LN))
        up, down = (
            loss(jax.tree.map(lambda x, m, s=s: np.where(m, x, s * x), params, masks))
            for s in (1 + share, 1 - share)
        )
        changes[layer, head] = abs(float(up - down)) / (2 * share)
    np.testing.assert_allclose(changes, scores, atol=0.01 * scores.max())


def test_units_with_the_highest_scores_are_kept():
    model, params = make(CONFIG)
    scores = unit_scores(model, params)
    units = choose_units(model, params, ShrinkConfig(heads=1, ff_width=4, width=5))
    for kept, score in ((units.width_D, scores["width"]), (units.ff_width_LF[1], scores["ff_width"][1])):
        assert score[kept].min() > score[~kept].max()
    assert units.heads_LN.sum(1).tolist() == [1, 1] and units.width_D.sum() == 5
    assert units.layers_L.all()


def test_random_units_depend_on_the_seed():
    model, params = make(CONFIG)
    kept = ShrinkConfig(width=6, ff_width=5, score="random")
    a, same_seed, other_seed = (choose_units(model, params, kept, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.width_D, same_seed.width_D)
    assert np.any(a.width_D != other_seed.width_D) and a.width_D.sum() == other_seed.width_D.sum() == 6
    assert np.any(a.ff_width_LF[0] != a.ff_width_LF[1])


def test_multiply_adds_by_hand():
    """Three tokens, width 2, one head, 5 channels, two layers, 30 items."""

    def work(**options):
        config = SASRecConfig(**({"width": 2, "ff_width": 5, "num_heads": 1, "num_layers": 2} | options))
        return answer_multiply_adds(define_model(build(config)), 3)

    # Per layer: 3 tokens x 4 kernels of 2 x 2 = 48; twice 9 pairs x 2 dims = 36. Feed-forward per token: 20.
    assert work() == 2 * (48 + 36) + (3 + 1) * 20 + 30 * 2
    assert work(num_layers=0) == 60
    # Projections of 3 tokens and one output, 1 x 2 each; 30 items of one dim.
    assert work(num_layers=0, item_dim=1) == 8 + 30
    # Kernels are 2 x 6.
    assert work(num_layers=1, num_heads=2, head_width=3) == 3 * 4 * 12 + 2 * 9 * 6 + 20 + 60


@pytest.mark.parametrize(
    "options, kept, message",
    [
        ({}, {"heads": 4}, "heads=4 .* num_heads=3"),
        ({}, {"width": 13}, "width=13 .* width=12"),
        ({}, {"ff_width": 11}, "ff_width=11"),
        ({}, {"num_layers": 3}, "num_layers=3"),
        ({}, {"num_layers": -1}, "num_layers=-1"),
        ({}, {"num_layers": 1}, "norm='post'.*distil"),
        ({"norm": "pre", "share_layers": True}, {"num_layers": 1}, "all layers share one block"),
        ({}, {"score": "taylor"}, "grads"),
    ],
)
def test_impossible_requests_are_refused(options, kept, message):
    model = make(dataclasses.replace(CONFIG, **options))[0]
    with pytest.raises(ValueError, match=message):
        choose_units(model, make(CONFIG)[1], ShrinkConfig(**kept))
