"""Compression of a trained run by recipes, in this process, on simulated data."""

import dataclasses
import functools
import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sasrec_ml1m
from rec_jax.compress.config import CompressConfig
from rec_jax.compress.prune import share_of_zeros
from rec_jax.compress.quant import QuantConfig, dequantize_params, is_quantized
from rec_jax.compress.shrink import ShrinkConfig, shrunk_config
from rec_jax.compress.work import answer_multiply_adds
from rec_jax.config import build
from rec_jax.experiment import Experiment
from rec_jax.models.base import define_model
from rec_jax.models.registry import model_builder
from rec_jax.recipes import RECIPES, WEIGHTS, compress, half_the_work, recipe_config, student_width
from rec_jax.run_config import ExperimentConfig
from rec_jax.tree import leaf_names


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    cfg = sasrec_ml1m.get_config("smoke")
    cfg.train.epochs, cfg.train.eval_every_epochs = 4, 2.0
    cfg.model.num_heads = 2
    cfg.mesh.data = 1
    cfg.eval.bootstrap = 0
    experiment = Experiment(build(ExperimentConfig, cfg), tmp_path_factory.mktemp("parent"))
    experiment.fit()
    return experiment


@pytest.fixture(scope="module")
def int8(parent, tmp_path_factory):
    return compressed(parent, tmp_path_factory.mktemp("int8"), compress__recipe="int8")


def compressed(parent, output, **overrides) -> Experiment:
    """The parent compressed with a config of overrides; `__` in a name stands for a dot."""
    config = recipe_config(parent, {name.replace("__", "."): value for name, value in overrides.items()})
    return compress(parent, config, output)


@functools.cache
def ndcg(run) -> float:
    return run.evaluate(run.trained.ranker(run.mesh), "test", quick=True)["ndcg@10"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_overrides_replace_settings_of_the_recipe_and_of_the_run(parent, recipe):
    config = recipe_config(parent, {"compress.recipe": recipe, "compress.floats": "bf16"})
    assert config.compress.floats == "bf16" and config.compress.recipe == recipe
    assert config.data == parent.config.data and config.loss == parent.config.loss
    assert dataclasses.replace(config.compress, recipe="") != CompressConfig() or recipe == "alone25"


def test_an_unknown_recipe_is_refused_with_the_known_names(parent):
    with pytest.raises(ValueError, match="'int9' is unknown: use bf16, int8"):
        recipe_config(parent, {"compress.recipe": "int9"})


def test_recipes_choose_the_largest_size_within_their_limit(parent):
    # 61 item entries, 16 positions; a layer of width D: 4 D^2 + 4 D, feed-forward 2 D^2 + 2 D, norms 4 D.
    def params(width):
        return 77 * width + 2 * (6 * width**2 + 10 * width) + 2 * width

    assert parent.num_params == params(16) == 4656
    width = student_width(parent, 0.25)
    assert params(width) <= 0.25 * 4656 < params(width + 4)
    config = shrunk_config(parent.config.model, half_the_work(parent))
    half = answer_multiply_adds(define_model(model_builder(config, 60, 16)), 16)
    assert 0.35 < half / answer_multiply_adds(parent.model, 16) <= 0.5


def test_an_int8_run_scores_like_its_parent_and_can_be_opened(parent, int8, tmp_path):
    assert abs(ndcg(int8) / ndcg(parent) - 1) < 0.02
    opened = Experiment.open(int8.workdir)
    assert opened.config.compress == int8.config.compress
    leaves = jax.tree.leaves(opened.trained.params, is_leaf=is_quantized)
    assert sum(is_quantized(leaf) for leaf in leaves) == 2 + 5 * 2
    with pytest.raises(ValueError, match="is quantized"):
        compress(opened, opened.config, tmp_path)


def test_one_run_trains_in_bf16_prunes_quantizes_and_stores_integers(parent, int8, tmp_path):
    overrides = {
        "compress__recipe": "prune70_int8",
        "precision__compute": "bf16",
        "compress__quant__aware_from": 0.5,
        "train__epochs": 3,
    }
    run = compressed(parent, tmp_path, **overrides)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in steps if "val/ndcg@10" in line]
    last = max(line["step"] for line in steps)
    assert evaluated and min(evaluated) > last / 2  # only once masks and fake quantization are in force
    stored = run.trained.params
    codes = [
        np.asarray(leaf.codes if hasattr(leaf, "codes") else leaf.weight.qvalue)
        for leaf in jax.tree.leaves(stored, is_leaf=is_quantized)
        if is_quantized(leaf)
    ]
    assert {x.dtype for x in codes} == {np.dtype("int8")}
    assert all((x == 0).sum() >= np.round(0.7 * x.size) for x in codes)
    aware = run.evaluate(run.ranker(run.fit().best_params), "test", quick=True)["ndcg@10"]
    assert abs(ndcg(run) / aware - 1) < 0.02  # stored integers against fake quantization in bf16
    assert run.trained.param_bytes < int8.trained.param_bytes  # zeros compress
    again = compressed(parent, tmp_path, **overrides)  # a finished run is not trained again
    jax.tree.map(np.testing.assert_array_equal, again.trained.params, stored)


def test_adapters_are_merged_into_a_plain_model(parent, tmp_path):
    names = ".*(query|up)/kernel"
    run = compressed(parent, tmp_path, compress__lora__names=names, compress__lora__rank=2, train__epochs=2)
    before, after = leaf_names(parent.trained.params), leaf_names(run.trained.params)
    changed = {name for name in before if np.any(np.asarray(before[name]) != np.asarray(after[name]))}
    assert changed == {f"blocks/{i}/{name}/kernel" for i in (0, 1) for name in ("attention/query", "ff/up")}
    opened = Experiment.open(tmp_path).trained.params
    jax.tree.map(np.testing.assert_array_equal, opened, run.trained.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(opened))


def test_a_shrunk_run_is_smaller_and_keeps_most_of_its_quality(parent, tmp_path):
    run = compressed(parent, tmp_path, compress__shrink__ff_width=12)  # no teacher, no training
    assert run.config.model.ff_width == 12 and run.config.compress.shrink == ShrinkConfig()
    assert run.num_params < parent.num_params
    assert ndcg(run) > 0.7 * ndcg(parent)


def test_units_may_be_chosen_by_gradients_of_the_training_loss(parent, tmp_path):
    taylor = compressed(parent, tmp_path / "a", compress__shrink__width=12, compress__shrink__score="taylor")
    random = compressed(parent, tmp_path / "b", compress__shrink__width=12, compress__shrink__score="random")
    assert taylor.config.model.width == 12
    by_taylor, by_chance = (
        taylor.evaluate(taylor.plain_ranker(run.trained.params), "test", quick=True)["ndcg@10"]
        for run in (taylor, random)
    )
    assert by_taylor > by_chance


def test_a_factorised_table_and_static_integers_keep_the_quality(parent, tmp_path):
    run = compressed(parent, tmp_path, model__item_dim=15)  # no teacher, no training
    assert run.num_params == parent.num_params + 15 * 16 - 61
    assert abs(ndcg(run) / ndcg(parent) - 1) < 0.1
    static = {"compress__recipe": "int8", "compress__quant__inputs": "static"}
    integers = compressed(parent, tmp_path / "int8", model__item_dim=15, **static)
    assert abs(ndcg(integers) / ndcg(run) - 1) < 0.02
    kernel = integers.trained.params["blocks"][0]["ff"]["up"]["kernel"]
    assert kernel.inputs == "static" and float(kernel.input_scale[0, 0]) > 0


def test_bf16_halves_the_file(parent, tmp_path):
    run = compressed(parent, tmp_path, compress__recipe="bf16")
    assert {x.dtype for x in jax.tree.leaves(run.trained.params)} == {jnp.dtype(jnp.bfloat16)}
    assert abs(ndcg(run) / ndcg(parent) - 1) < 0.05
    assert run.trained.param_bytes < 0.6 * parent.trained.param_bytes


def test_impossible_compressions_are_refused(parent, tmp_path):
    with pytest.raises(
        ValueError, match="compress.quant.names='nothing' matches no parameter.*items/embedding"
    ):
        compressed(parent, tmp_path / "a", compress__quant__names="nothing")
    with pytest.raises(ValueError, match="heads=3 must be at most"):
        compressed(parent, tmp_path / "b", compress__shrink__heads=3)
    with pytest.raises(ValueError, match="aware=True quantizes nothing"):
        QuantConfig(aware=True)
    with pytest.raises(ValueError, match="shrink first, then distil"):
        compressed(parent, tmp_path / "c", compress__shrink__ff_width=8, model__width=12)
    with pytest.raises(ValueError, match="masks on adapters leave the merged weights dense"):
        compressed(parent, tmp_path / "d", compress__lora__names=".*kernel", compress__prune__names=".*")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({}, "no compression requested"),
        ({"compress.recipe": "int8", "train.epochs": 3}, "train.epochs: nothing will be trained"),
        ({"compress.recipe": "int8", "data.max_len": 8}, "data.* must be that of the trained run"),
    ],
)
def test_ignored_settings_are_refused(parent, overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe_config(parent, overrides)


def test_a_directory_with_another_run_is_not_changed(parent, int8):
    before = (int8.workdir / "config.json").read_text()
    with pytest.raises(ValueError, match="holds a run with another compress"):
        compressed(parent, int8.workdir, compress__recipe="bf16")
    assert (int8.workdir / "config.json").read_text() == before


def test_a_quantized_run_can_be_a_teacher(parent, int8, tmp_path):
    student = {
        "model__width": 8,
        "compress__distill__teachers": (str(int8.workdir),),
        "train__epochs": 1,
        "train__eval_every_epochs": 1.0,
    }
    run = compressed(parent, tmp_path, **student)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.trained.params))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line.get("val/ndcg@10", 0) > 0]


@pytest.mark.parametrize(
    "page, changes",
    [
        ("tiger_beauty", {"model.num_beams": 8}),
        ("bert4rec_ml1m", {"model.num_experts": 3, "compress.quant.inputs": "static"}),
    ],
)
def test_other_model_types_are_pruned_and_stored_in_integers(page, changes, tmp_path):
    """The stored model has the masks and the quantized parameters, and still recommends. The parent has its
    initial parameters: the training to test is that of the compression."""
    cfg = importlib.import_module(f"configs.{page}").get_config("smoke")
    cfg.train.epochs, cfg.train.eval_every_epochs, cfg.train.patience = 2, 2.0, 0
    cfg.model.num_layers, cfg.mesh.data, cfg.eval.bootstrap = 1, 1, 0
    model_changes = {name: x for name, x in changes.items() if name.startswith("model.")}
    cfg.update_from_flattened_dict(model_changes)
    run = Experiment(build(ExperimentConfig, cfg), tmp_path / "run")
    run.save_model(run.first_params(), step=0)
    overrides = {"compress.recipe": "prune70_int8", "train.epochs": 1}
    overrides |= {name: x for name, x in changes.items() if name not in model_changes}
    small = compress(run, recipe_config(run, overrides), tmp_path / "small")
    stored = Experiment.open(tmp_path / "small").trained.params
    for name, leaf in zip(
        leaf_names(run.model.abstract_params), jax.tree.leaves(stored, is_leaf=is_quantized), strict=True
    ):
        assert is_quantized(leaf) == bool(re.fullmatch(WEIGHTS, name)), name
    zeros = share_of_zeros(dequantize_params(stored), WEIGHTS)
    assert zeros >= 0.69
    assert np.isfinite(ndcg(small)) and ndcg(small) > 0
