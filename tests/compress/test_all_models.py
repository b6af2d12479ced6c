"""Every kind of compression on a tiny model of every type, mixtures of experts included."""

import re
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
from rec_jax.tree import leaf_mask, leaf_names, num_params

NUM_ITEMS, MAX_LEN = 30, 10
SIZES = {"width": 16, "ff_width": 12, "num_heads": 4, "num_layers": 1, "dropout": 0.0}
CONFIGS = {
    "sasrec": SASRecConfig(**SIZES),
    "sasrec, experts": SASRecConfig(**SIZES, num_experts=3, norm="pre"),
    "esasrec, 2 layers": ESASRecConfig(**SIZES | {"num_layers": 2}),
    "esasrec, experts": ESASRecConfig(**SIZES, num_experts=3, experts_per_token=1),
    "bert4rec": BERT4RecConfig(**SIZES),
    "hstu": HSTUConfig(width=16, num_heads=4, num_layers=1, value_width=3, dropout=0.0),
    "gru4rec, 2 layers": GRU4RecConfig(width=16, num_layers=2, dropout=0.0),
    "gru4rec, hidden_width": GRU4RecConfig(width=16, hidden_width=12, dropout=0.0),
    "lru": LRUConfig(width=16, ff_width=12, num_layers=1, dropout=0.0),
    "tiger": TigerConfig(**SIZES, prefix_embeddings=True),
}
EVERY_MODEL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
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
    """Returns (model, params): random NumPy arrays, none of them at its initial value."""
    model, rng = define(config), np.random.default_rng(1)
    return model, jax.tree.map(
        lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), model.abstract_params
    )


@partial(jax.jit, static_argnums=0)
def scores(model, params):
    """Scores at the real tokens: of the catalogue, or of the first level of semantic ids."""
    module = model.bind(params)
    x_TD = module(BATCH)[np.asarray(BATCH.segments) > 0]
    if model.is_generative:
        return module.log_probs(x_TD, jnp.zeros(len(x_TD), int), 0)
    table_VD = module.item_vectors()
    return x_TD @ (table_VD.dequantize() if hasattr(table_VD, "dequantize") else table_VD).T


@partial(jax.jit, static_argnums=(0, 1))
def fake_quantized_scores(model, quant, params, is_on):
    return scores(model, fake_quantize_params(params, quant, is_on, model.dims))


def test_configs_cover_every_model_type():
    assert {type(config) for config in CONFIGS.values()} == set(MODELS)


@EVERY_MODEL
def test_named_dims_match_the_shapes_of_parameters(config):
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
        QuantConfig(WEIGHTS, table_bits=4),
        QuantConfig(WEIGHTS, inputs="dynamic"),
        QuantConfig(WEIGHTS, inputs="static", symmetric=False),
    ],
    ids=["float inputs and int4 tables", "dynamic", "static"],
)
def test_quantized_scores_are_close_to_float_scores(config, quant):
    model, params = make(config)
    samples = observe_inputs(model, params, [BATCH]) if quant.inputs == "static" else None
    quantized = quantize_params(params, quant, samples, model.dims)
    named = leaf_names(params)
    leaves = dict(zip(named, jax.tree.leaves(quantized, is_leaf=is_quantized), strict=True))
    for name, leaf in leaves.items():
        is_table, is_kernel = name.endswith("embedding"), name.endswith("kernel") and "router" not in name
        assert is_quantized(leaf) == (is_table or is_kernel)
        jax.tree.map(np.testing.assert_array_equal, unpack_leaf(*pack_leaf(leaf)), leaf)
    expected, quantized_scores = scores(model, params), scores(model, quantized)
    is_score = np.isfinite(expected)
    error = np.sqrt(np.mean((quantized_scores - expected)[is_score] ** 2)) / np.std(expected[is_score])
    # With 4 bits errors are larger, most of all for tiger, whose tokens are sums of several table entries.
    assert error < (0.3 if quant.table_bits == 4 else 0.06), error
    if quant.inputs == "float":  # the model computes with the dequantized weights
        plain = scores(model, dequantize_params(quantized))
        np.testing.assert_allclose(plain, quantized_scores, rtol=1e-3, atol=1e-4)


@EVERY_MODEL
def test_fake_quantization_gives_the_scores_of_the_stored_model(config):
    model, params = make(config)
    quant = QuantConfig(WEIGHTS, inputs="dynamic", aware=True)
    stored = scores(model, quantize_params(params, quant, dims=model.dims))
    on, off = (fake_quantized_scores(model, quant, params, is_on) for is_on in (True, False))
    is_score = np.isfinite(stored)
    assert np.sqrt(np.mean((on - stored)[is_score] ** 2)) < 0.02 * np.std(stored[is_score])
    np.testing.assert_allclose(off, scores(model, params), rtol=1e-4, atol=1e-4)


def test_stacked_kernels_of_experts_are_pruned_to_the_requested_share():
    model, params = make(CONFIGS["esasrec, experts"])
    optimizer = prune(optax.sgd(0.1), PruneConfig(names=WEIGHTS, share=0.7), params, 4)
    state, zeros = optimizer.init(params), jax.tree.map(np.zeros_like, params)
    update = jax.jit(optimizer.update)
    for _ in range(4):
        updates, state = update(zeros, state, params)
        params = jax.tree.map(np.add, params, jax.device_get(updates))
    assert share_of_zeros(params, WEIGHTS) == pytest.approx(0.7, abs=0.01)
    assert np.isfinite(scores(model, params)).all()


@EVERY_MODEL
def test_scores_stay_finite_with_most_weights_at_zero(config):
    model, params = make(config)
    matched = leaf_mask(params, WEIGHTS, field="names")
    bound = np.quantile(np.abs(np.concatenate([x.ravel() for x in jax.tree.leaves(params)])), 0.7)
    pruned = jax.tree.map(lambda x, is_in: np.where(is_in & (np.abs(x) < bound), 0, x), params, matched)
    expected = scores(model, params)
    np.testing.assert_array_equal(np.isfinite(scores(model, pruned)), np.isfinite(expected))


LORA = LoraConfig(names=WEIGHTS, rank=2, alpha=3.0)


@EVERY_MODEL
def test_adapters_fit_the_shapes_of_all_kernels_and_tables(config):
    model, params = make(config)
    adapters = jax.eval_shape(lambda params: init_lora(params, LORA, 0, model.dims), params)
    assert set(adapters) == {name for name in leaf_names(params) if re.fullmatch(WEIGHTS, name)}
    merged = jax.eval_shape(lambda params, adapters: merge_lora(params, adapters, LORA), params, adapters)
    assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, params)


@pytest.mark.parametrize("name", ["sasrec, experts", "esasrec, experts"])
def test_new_adapters_change_nothing_and_each_expert_has_its_own(name):
    model, params = make(CONFIGS[name])
    adapters = jax.jit(lambda params: init_lora(params, LORA, 0, model.dims))(params)
    merge = jax.jit(lambda params, adapters: merge_lora(params, adapters, LORA))
    jax.tree.map(np.testing.assert_array_equal, merge(params, adapters), params)
    trained = {name: {"a": ab["a"], "b": np.asarray(ab["b"]) + 1} for name, ab in adapters.items()}
    merged = leaf_names(merge(params, trained))
    for name in trained:
        change = np.asarray(merged[name]) - leaf_names(params)[name]
        kernels = change if "_kernel" in name else change[None]
        ranks = {np.linalg.matrix_rank(k.reshape(len(k), -1), tol=1e-3) for k in kernels}
        assert ranks == {1}  # all columns of b are equal


TWO_LAYERS = SIZES | {"num_layers": 2}


@pytest.mark.parametrize(
    "config, kept",
    [
        (CONFIGS["esasrec, 2 layers"], {"heads": 2, "ff_width": 5, "width": 9, "num_layers": 1}),
        (CONFIGS["esasrec, experts"], {"heads": 2, "width": 9}),
        (CONFIGS["bert4rec"], {"heads": 1, "ff_width": 7, "width": 10}),
        (CONFIGS["hstu"], {"heads": 3, "width": 11}),
        (HSTUConfig(width=16, num_heads=4, dropout=0.0), {"heads": 2, "num_layers": 1}),
        (CONFIGS["gru4rec, 2 layers"], {"width": 9}),
        (CONFIGS["gru4rec, hidden_width"], {"width": 9}),
        (LRUConfig(width=16, ff_width=12, dropout=0.0), {"width": 9, "ff_width": 4, "num_layers": 1}),
        (TigerConfig(**TWO_LAYERS, prefix_embeddings=True), {"ff_width": 5, "num_layers": 1}),
        (SASRecConfig(**SIZES, num_future=2), {"width": 9}),
    ],
    ids=lambda value: getattr(value, "type", None) or ",".join(value),
)
def test_a_shrunk_model_scores_like_the_masked_model(config, kept):
    model, params = make(config)
    kept = ShrinkConfig(**kept)
    units = choose_units(model, params, kept)
    small_config, small_params = shrink(model, params, units)
    assert small_config == shrunk_config(config, kept)
    small = define(small_config)
    assert jax.tree.map(np.shape, small_params) == jax.tree.map(np.shape, small.abstract_params)
    masks = unit_masks(model, params, units)
    assert sum(m.sum() for m in jax.tree.leaves(masks)) == num_params(small_params) < num_params(params)
    expected = scores(model, mask(params, masks))
    small_scores = scores(small, small_params)
    np.testing.assert_allclose(small_scores, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - scores(model, params))[np.isfinite(expected)].max() > 0.01


@pytest.mark.parametrize(
    "config, kept, message",
    [
        (SASRecConfig(**SIZES, num_experts=3), {"ff_width": 5}, "ff_width=5: .*'sasrec' has no such units"),
        (LRUConfig(), {"heads": 1}, "heads=1: a model of type='lru' has no such units"),
        (GRU4RecConfig(num_layers=2), {"num_layers": 1}, "num_layers=1: a layer replaces its input"),
        (TigerConfig(**SIZES), {"width": 8}, "width=8: .*'tiger' has heads of width / num_heads"),
    ],
    ids=["experts", "lru", "gru4rec", "tiger"],
)
def test_units_that_a_model_type_cannot_remove_are_refused(config, kept, message):
    with pytest.raises(ValueError, match=message):
        choose_units(*make(config), ShrinkConfig(**kept))
