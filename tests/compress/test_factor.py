"""Low-rank matrices: approximation errors against theory, and adapters that merge bit for bit."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.compress.factor import (
    LoraConfig,
    factorise,
    factorise_model,
    init_lora,
    merge_lora,
    student_from,
)
from rec_jax.data.batch import Batch
from rec_jax.models.base import define_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.tree import leaf_names

NUM_ITEMS, MAX_LEN = 25, 6
CONFIG = SASRecConfig(width=8, ff_width=6, num_heads=2, num_layers=1, dropout=0.0)
BATCH = Batch(
    {"item": np.array([[3, 7, 7, 1, 5, 6]])},
    segments=np.array([[1, 1, 1, 1, 2, 2]]),
    positions=np.array([[0, 1, 2, 3, 0, 1]]),
)


@cache
def define(config, num_items):
    return define_model(lambda rngs: SASRec(config, num_items, MAX_LEN, rngs=rngs))


def make(config, seed=0, num_items=NUM_ITEMS):
    """Returns (model, params): random NumPy arrays, none of them at its initial value."""
    model = define(config, num_items)
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.5, model.abstract_params
    )


@partial(jax.jit, static_argnums=0)
def scores(model, params):
    module = model.bind(params)
    return module(BATCH)[0] @ module.item_vectors().T


def test_factorisation_has_the_least_possible_error():
    """The error is the norm of the discarded singular values."""
    table_VD = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32)
    singular = np.linalg.svd(table_VD, compute_uv=False)
    for dim in (1, 4, 9):
        table_VE, projection_ED = factorise(table_VD, dim)
        assert table_VE.shape == (40, dim) and table_VE.dtype == projection_ED.dtype == np.float32
        np.testing.assert_allclose(projection_ED @ projection_ED.T, np.eye(dim), atol=1e-6)
        error = np.linalg.norm(table_VD - table_VE @ projection_ED)
        assert error == pytest.approx(np.linalg.norm(singular[dim:]), rel=1e-4, abs=1e-5)


def test_a_factorised_model_scores_like_the_model_with_the_low_rank_table():
    model, params = make(CONFIG)
    config, small = factorise_model(CONFIG, params, 3)
    assert config == dataclasses.replace(CONFIG, item_dim=3)
    small_model = make(config)[0]
    assert jax.tree.structure(small) == jax.tree.structure(small_model.abstract_params)
    table_VD = small["items"]["embedding"] @ small["project"]["kernel"]
    expected = scores(model, params | {"items": {"embedding": table_VD}})
    np.testing.assert_allclose(scores(small_model, small), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - scores(model, params)).max() > 0.1


def test_a_student_keeps_inner_products_as_well_as_its_width_allows():
    _, params = make(CONFIG)
    config = dataclasses.replace(CONFIG, width=4, num_heads=1)
    fresh = make(config, seed=1)[1]
    student = student_from(CONFIG, params, config, fresh)
    table_VD, table_VW = params["items"]["embedding"], student["items"]["embedding"]
    # The inputs of the blocks are the entries times sqrt(width).
    error = 8 * table_VD @ table_VD.T - 4 * table_VW @ table_VW.T
    discarded = 8 * np.linalg.svd(table_VD, compute_uv=False)[4:] ** 2
    assert np.linalg.norm(error) == pytest.approx(np.linalg.norm(discarded), rel=1e-4)
    others = [name for name in leaf_names(fresh) if "embedding" not in name]
    for name in others:
        assert leaf_names(student)[name] is leaf_names(fresh)[name]


@pytest.mark.parametrize("options", [{}, {"item_dim": 3}, {"full_width": 12}], ids=str)
def test_a_teacher_of_low_rank_is_reproduced_exactly(options):
    """Items and positions span three dims, so a student of width 4 keeps all inner products of the inputs."""
    rng = np.random.default_rng(0)
    teacher_config = dataclasses.replace(CONFIG, **options)
    _, params = make(teacher_config)
    basis_3D = rng.normal(size=(3, 8)).astype(np.float32)
    items_V3 = params["items"]["embedding"][:, :3]
    if "item_dim" in options:
        params["project"]["kernel"] = basis_3D
    else:
        params["items"]["embedding"] = items_V3 @ basis_3D
    positions_S3 = params["positions"]["embedding"][:, :3]
    params["positions"]["embedding"] = positions_S3 @ basis_3D

    config = dataclasses.replace(CONFIG, width=4)
    student = student_from(teacher_config, params, config, make(config, seed=1)[1])
    factor = (teacher_config.full_width or 8) ** 0.5
    expected = np.concatenate([factor * items_V3 @ basis_3D, positions_S3 @ basis_3D])
    inputs = np.concatenate([2 * student["items"]["embedding"], student["positions"]["embedding"]])
    np.testing.assert_allclose(inputs @ inputs.T, expected @ expected.T, rtol=1e-3, atol=1e-3)


def test_the_scores_of_a_student_are_as_large_as_those_of_its_teacher():
    """The models have no layers: their final norm alone gives outputs a length of about sqrt(width)."""
    teacher_config = dataclasses.replace(CONFIG, width=64, num_layers=0, position="rotary")
    config = dataclasses.replace(teacher_config, width=16)
    teacher, params = make(teacher_config)
    params["final_norm"] = {"scale": np.ones(64, np.float32), "bias": np.zeros(64, np.float32)}
    params["items"]["embedding"][:, 8:] = 0  # of rank 8
    student, fresh = make(config, seed=1)
    fresh["final_norm"] = {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}
    small = student_from(teacher_config, params, config, fresh)
    expected, student_scores = np.asarray(scores(teacher, params)), np.asarray(scores(student, small))
    assert np.std(student_scores) == pytest.approx(np.std(expected), rel=0.1)


def test_students_of_the_same_width_or_with_a_factorised_table():
    _, params = make(CONFIG)
    same = student_from(CONFIG, params, CONFIG, make(CONFIG, seed=1)[1])
    for name in ("items", "positions"):
        np.testing.assert_array_equal(same[name]["embedding"], params[name]["embedding"])
    config = dataclasses.replace(CONFIG, item_dim=3)
    factorised = student_from(CONFIG, params, config, make(config, seed=1)[1])
    expected = factorise(params["items"]["embedding"], 3)
    np.testing.assert_array_equal(factorised["items"]["embedding"], expected[0])
    np.testing.assert_array_equal(factorised["project"]["kernel"], expected[1])


LORA = LoraConfig(names=r".*(kernel|items/embedding)", rank=2, alpha=3.0)


def trained_adapters(params, config=LORA):
    """Adapters as after some training: b is not 0."""
    rng = np.random.default_rng(2)
    adapters = init_lora(params, config, seed=0)
    return {
        name: {"a": ab["a"], "b": jnp.asarray(rng.normal(size=ab["b"].shape), jnp.float32)}
        for name, ab in adapters.items()
    }


def test_new_adapters_change_nothing_and_depend_on_the_seed():
    _, params = make(CONFIG)
    adapters, same_seed, other_seed = (init_lora(params, LORA, seed=seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, merge_lora(params, adapters, LORA), params)
    name = "blocks/0/attention/key_value/kernel"
    assert adapters[name]["a"].shape == (8, 2) and adapters[name]["b"].shape == (2, 16)
    np.testing.assert_array_equal(adapters[name]["a"], same_seed[name]["a"])
    assert np.all(adapters[name]["a"] != other_seed[name]["a"])
    assert np.all(adapters[name]["a"] != adapters["blocks/0/attention/query/kernel"]["a"])
    assert {n for n in leaf_names(params) if n.endswith("kernel")} | {"items/embedding"} == set(adapters)


def test_merged_kernels_by_hand():
    params = {"w": np.arange(8.0, dtype=np.float32).reshape(2, 2, 2), "bias": np.ones(2, np.float32)}
    adapters = {"w": {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[1.0, 0.0, -1.0, 3.0]])}}
    merged = merge_lora(params, adapters, LoraConfig(names="w", rank=1, alpha=2.0))
    np.testing.assert_array_equal(merged["w"], [[[2, 1], [0, 9]], [[8, 5], [2, 19]]])
    assert merged["bias"] is params["bias"]


def test_the_merged_model_has_the_outputs_of_training_bit_for_bit():
    model, params = make(CONFIG)
    adapters = trained_adapters(params)
    adapted = jax.jit(lambda params, adapters: scores(model, merge_lora(params, adapters, LORA)))
    merged = merge_lora(params, adapters, LORA)
    np.testing.assert_array_equal(adapted(params, adapters), scores(model, merged))
    assert np.abs(scores(model, merged) - scores(model, params)).max() > 0.1


def test_gradients_of_adapters_follow_from_those_of_merged_kernels():
    """The chain rule through a and b."""
    model, params = make(CONFIG)
    config = dataclasses.replace(LORA, names=r".*query/kernel")
    adapters = trained_adapters(params, config)

    def loss(params):
        return jnp.mean(jnp.sin(scores(model, params)))

    grads = jax.jit(jax.grad(lambda adapters: loss(merge_lora(params, adapters, config))))(adapters)
    assert list(grads) == ["blocks/0/attention/query/kernel"]
    ((name, pair),) = adapters.items()
    dw_DF = leaf_names(jax.jit(jax.grad(loss))(merge_lora(params, adapters, config)))[name]
    scale = config.alpha / config.rank
    np.testing.assert_allclose(grads[name]["a"], scale * dw_DF @ pair["b"].T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads[name]["b"], scale * pair["a"].T @ dw_DF, rtol=1e-4, atol=1e-6)
    assert np.abs(dw_DF).max() > 1e-4


@pytest.mark.parametrize(
    "mistake, message",
    [
        (lambda p: factorise(p["items"]["embedding"], 9), "item_dim=9 must be from 1"),
        (lambda p: factorise(p["items"]["embedding"], 0), "item_dim=0"),
        (lambda p: factorise_model(dataclasses.replace(CONFIG, item_dim=3), p, 2), "factorised already"),
        (lambda p: factorise_model(dataclasses.replace(CONFIG, l2_normalize=True), p, 2), "l2_normalize"),
        (lambda p: student_from(CONFIG, p, dataclasses.replace(CONFIG, width=10), p), "width=10"),
        (lambda p: student_from(CONFIG, p, CONFIG, make(CONFIG, num_items=5)[1]), "5 items, .* 25"),
        (lambda p: init_lora(p, LoraConfig(names="nothing"), 0), "compress.lora.names='nothing'.*items"),
        (lambda p: init_lora(p, LoraConfig(names=".*query.*"), 0), "query/bias, a vector"),
        (lambda p: LoraConfig(rank=0), "rank=0"),
        (lambda p: LoraConfig(alpha=0.0), "alpha=0.0"),
    ],
)
def test_impossible_requests_are_refused(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake(make(CONFIG)[1])
