"""Every model type, mixtures of experts included, under every kind of compression, on tiny models."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rec_jax.compress.factor import LoraConfig, init_lora, merge_lora
from rec_jax.compress.prune import PruneConfig, prune, share_of_zeros
from rec_jax.compress.quant import (
    QuantConfig,
    dequantize_params,
    fake_quantize_params,
    is_quantized,
    observe_inputs,
    pack_leaf,
    quantize_params,
    unpack_leaf,
)
from rec_jax.compress.shrink import ShrinkConfig, choose_units, mask, shrink, shrunk_config, unit_masks
from rec_jax.data.batch import Batch
from rec_jax.models.base import define_model
from rec_jax.models.bert4rec import BERT4RecConfig
from rec_jax.models.esasrec import ESASRecConfig
from rec_jax.models.gru4rec import GRU4RecConfig
from rec_jax.models.hstu import HSTUConfig
from rec_jax.models.lru import LRUConfig
from rec_jax.models.registry import MODELS, model_builder
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.models.semantic_ids import SemanticIdsConfig, numbered_semantic_ids
from rec_jax.models.tiger import TigerConfig
from rec_jax.recipes import WEIGHTS
from rec_jax.tree import leaf_names, num_params

NUM_ITEMS, MAX_LEN = 30, 10
SIZES = {"width": 16, "ff_width": 12, "num_heads": 4, "dropout": 0.0}
CONFIGS = [
    SASRecConfig(**SIZES),
    SASRecConfig(**SIZES, num_experts=3, norm="pre"),
    ESASRecConfig(**SIZES),
    ESASRecConfig(**SIZES, num_experts=3, experts_per_token=1),
    BERT4RecConfig(**SIZES),
    HSTUConfig(width=16, num_heads=4, value_width=3, dropout=0.0),
    GRU4RecConfig(width=16, num_layers=2, dropout=0.0),
    GRU4RecConfig(width=16, hidden_width=12, dropout=0.0),
    LRUConfig(width=16, ff_width=12, dropout=0.0),
    TigerConfig(**SIZES, prefix_embeddings=True),
]
EVERY_MODEL = pytest.mark.parametrize("config", CONFIGS, ids=str)
POSITIONS = np.array([[*range(4), *range(5), 0], range(10)])
BATCH = Batch(
    {
        "item": jnp.array([[3, 7, 7, 1, 5, 6, 2, 9, 11, 0], range(20, 30)]),
        "time": jnp.asarray(POSITIONS * 3600),
    },
    segments=jnp.array([[1] * 4 + [2] * 5 + [0], [1] * 10]),
    positions=jnp.asarray(POSITIONS),
    is_query=jnp.arange(10) == jnp.array([[8], [9]]),
)


def define(config):
    semantic_ids = numbered_semantic_ids(NUM_ITEMS, SemanticIdsConfig(codebook_size=4, num_levels=2))
    return define_model(model_builder(config, NUM_ITEMS, MAX_LEN, semantic_ids))


@cache
def make(config):
    """(model, params far from their start)."""
    model, rng = define(config), np.random.default_rng(1)
    return model, jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), model.abstract_params
    )


@partial(jax.jit, static_argnums=0)
def scores(model, params):
    """Of the catalogue, or of the codes that an item may begin with, at the real tokens."""
    module = model.bind(params)
    x_TD = module(BATCH)[np.asarray(BATCH.segments) > 0]
    if model.is_generative:
        return module.log_probs(x_TD, jnp.zeros(len(x_TD), int), 0)
    table_VD = module.item_vectors()
    return x_TD @ (table_VD.dequantize() if hasattr(table_VD, "dequantize") else table_VD).T


def test_every_model_is_here():
    assert {type(config) for config in CONFIGS} == set(MODELS)


@EVERY_MODEL
def test_every_dim_has_a_name_or_none(config):
    model, _ = make(config)
    shapes = leaf_names(model.abstract_params)
    assert set(model.dims) == set(shapes)
    for name, dims in model.dims.items():
        sizes = [sum(np.prod([size for _, size in part]) for part in dim) for dim in dims]
        assert tuple(sizes) == shapes[name].shape, name


@EVERY_MODEL
@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(WEIGHTS),
        QuantConfig(WEIGHTS, inputs="dynamic"),
        QuantConfig(WEIGHTS, inputs="static", symmetric=False),
        QuantConfig(".*embedding", table_bits=4),
    ],
    ids=["float", "dynamic", "static", "int4"],
)
def test_integers_score_like_floats(config, quant):
    model, params = make(config)
    samples = observe_inputs(model, params, [BATCH]) if quant.inputs == "static" else None
    quantized = quantize_params(params, quant, samples, model.dims)
    named = leaf_names(params)
    leaves = dict(zip(named, jax.tree.leaves(quantized, is_leaf=is_quantized), strict=True))
    for name, leaf in leaves.items():
        is_table, is_kernel = name.endswith("embedding"), name.endswith("kernel") and "router" not in name
        assert is_quantized(leaf) == (is_table or (is_kernel and quant.table_bits == 8))
        if is_quantized(leaf):
            again = unpack_leaf(*pack_leaf(leaf))
            np.testing.assert_array_equal(again.dequantize(), leaf.dequantize())
    whole, small = scores(model, params), scores(model, quantized)
    is_score = np.isfinite(whole)
    error = np.sqrt(np.mean((small - whole)[is_score] ** 2)) / np.std(whole[is_score])
    # A token of tiger is the sum of several rows of 4 bits.
    assert error < (0.3 if quant.table_bits == 4 else 0.06), error
    if quant.inputs == "float":  # what is read is what is multiplied
        np.testing.assert_allclose(scores(model, dequantize_params(quantized)), small, rtol=1e-3, atol=1e-4)


@EVERY_MODEL
def test_training_sees_what_will_be_stored(config):
    model, params = make(config)
    quant = QuantConfig(WEIGHTS, inputs="dynamic", aware=True)
    stored = scores(model, quantize_params(params, quant, dims=model.dims))
    faked = scores(model, fake_quantize_params(params, quant, True, model.dims))
    off = scores(model, fake_quantize_params(params, quant, jnp.array(False), model.dims))
    is_score = np.isfinite(stored)
    assert np.sqrt(np.mean((faked - stored)[is_score] ** 2)) < 0.02 * np.std(stored[is_score])
    np.testing.assert_allclose(off, scores(model, params), rtol=1e-4, atol=1e-4)


@EVERY_MODEL
def test_the_pruned_share_is_right(config):
    model, params = make(config)
    optimizer = prune(optax.sgd(0.1), PruneConfig(names=WEIGHTS, share=0.7), params, 4)
    state, zeros = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(optimizer.update)
    for _ in range(4):
        updates, state = update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    assert share_of_zeros(params, WEIGHTS) == pytest.approx(0.7, abs=0.01)
    assert np.isfinite(scores(model, params)).any()


@EVERY_MODEL
def test_adapters_change_nothing_at_first_and_every_expert_has_its_own(config):
    model, params = make(config)
    lora = LoraConfig(names=WEIGHTS, rank=2, alpha=3.0)
    adapters = init_lora(params, lora, 0, model.dims)
    jax.tree.map(np.testing.assert_array_equal, merge_lora(params, adapters, lora), params)
    trained = {name: {"a": ab["a"], "b": ab["b"] + 1} for name, ab in adapters.items()}
    merged = leaf_names(merge_lora(params, trained, lora))
    for name, x in leaf_names(params).items():
        if name in trained:
            change = np.asarray(merged[name] - x)
            kernels = change if "_kernel" in name else change[None]
            ranks = {np.linalg.matrix_rank(k.reshape(len(k), -1), tol=1e-3) for k in kernels}
            assert ranks == {1}  # all outputs of b are the same


@pytest.mark.parametrize(
    "config, left",
    [
        (ESASRecConfig(**SIZES), {"heads": 2, "ff_width": 5, "width": 9, "num_layers": 1}),
        (ESASRecConfig(**SIZES, num_experts=3), {"heads": 2, "width": 9}),
        (BERT4RecConfig(**SIZES), {"heads": 1, "ff_width": 7, "width": 10}),
        (HSTUConfig(width=16, num_heads=4, value_width=3, dropout=0.0), {"heads": 3, "width": 11}),
        (HSTUConfig(width=16, num_heads=4, dropout=0.0), {"heads": 2, "num_layers": 1}),
        (GRU4RecConfig(width=16, num_layers=2, dropout=0.0), {"width": 9}),
        (GRU4RecConfig(width=16, hidden_width=12, dropout=0.0), {"width": 9}),
        (LRUConfig(width=16, ff_width=12, dropout=0.0), {"width": 9, "ff_width": 4, "num_layers": 1}),
        (TigerConfig(**SIZES, prefix_embeddings=True), {"ff_width": 5, "num_layers": 1}),
        (SASRecConfig(**SIZES, num_future=2), {"width": 9}),
    ],
    ids=str,
)
def test_the_smaller_model_gives_what_the_masked_one_gives(config, left):
    model, params = make(config)
    left = ShrinkConfig(**left)
    units = choose_units(model, params, left)
    small_config, small_params = shrink(model, params, units)
    assert small_config == shrunk_config(config, left)
    small = define(small_config)
    assert jax.tree.map(np.shape, small_params) == jax.tree.map(np.shape, small.abstract_params)
    masks = unit_masks(model, params, units)
    assert sum(m.sum() for m in jax.tree.leaves(masks)) == num_params(small_params) < num_params(params)
    expected = scores(model, mask(params, masks))
    small_scores = scores(small, jax.tree.map(jnp.asarray, small_params))
    np.testing.assert_allclose(small_scores, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - scores(model, params))[np.isfinite(expected)].max() > 0.01


@pytest.mark.parametrize(
    "config, left, message",
    [
        (SASRecConfig(**SIZES, num_experts=3), {"ff_width": 5}, "ff_width=5: .*'sasrec' has no such units"),
        (LRUConfig(), {"heads": 1}, "heads=1: a model of type='lru' has no such units"),
        (GRU4RecConfig(num_layers=2), {"num_layers": 1}, "num_layers=1: a layer replaces its input"),
        (TigerConfig(**SIZES), {"width": 8}, "width=8: .*'tiger' has heads of width / num_heads"),
    ],
    ids=str,
)
def test_what_cannot_shrink_is_refused_with_the_reason(config, left, message):
    with pytest.raises(ValueError, match=message):
        choose_units(*make(config), ShrinkConfig(**left))
