"""Generative retrieval: beam search returns items only, with the scores and in the order that scoring every
item gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import pack, random_params

from rec_jax.compress.config import CompressConfig
from rec_jax.config import build
from rec_jax.data.datasets import DataConfig
from rec_jax.mesh import MeshConfig, make_mesh, place_batch
from rec_jax.models import tiger
from rec_jax.models.base import define_model, init_model
from rec_jax.models.beam import beam_search
from rec_jax.models.registry import model_builder
from rec_jax.models.semantic_ids import SemanticIds, SemanticIdsConfig, numbered_semantic_ids
from rec_jax.models.tiger import Tiger, TigerConfig
from rec_jax.objectives.distill import DistillConfig
from rec_jax.objectives.token_loss import BCEConfig
from rec_jax.run_config import ExperimentConfig
from rec_jax.tables.config import TableConfig
from rec_jax.train.precision import PrecisionConfig
from rec_jax.training import make_step

NUM_CODES, LEVELS, MAX_LEN = 4, 3, 8
SMALL = TigerConfig(width=8, ff_width=12, num_heads=2, num_layers=1, dropout=0.0)


def random_semantic_ids(num_items, seed=0):
    """Returns `num_items` of the 64 possible paths, in random order."""
    paths = np.stack(np.unravel_index(np.arange(NUM_CODES**LEVELS), (NUM_CODES,) * LEVELS), axis=1)
    chosen = np.random.default_rng(seed).permutation(paths)[:num_items]
    return SemanticIds(np.pad(chosen, ((1, 0), (0, 0))), NUM_CODES)


@functools.cache
def make(num_items, norm, prefix_embeddings):
    config = dataclasses.replace(SMALL, norm=norm, prefix_embeddings=prefix_embeddings)
    semantic_ids = random_semantic_ids(num_items)
    model = define_model(lambda rngs: Tiger(config, num_items, MAX_LEN, semantic_ids=semantic_ids, rngs=rngs))
    return model, jax.tree.map(jnp.asarray, random_params(model, std=0.4))


def packed():
    """Returns one row with histories of 5 and 3 events. Their last events are at columns 4 and 7."""
    return pack([[[3, 1, 7, 2, 5], [9, 4, 1]]], length=MAX_LEN)


@functools.cache
def losses(*which):
    model, params = make(*which)
    return jax.jit(lambda batch: model.bind(params).loss(batch, None, None)[0])


def search(which, columns, num_beams):
    """Returns the results of a beam search after the events at these columns, as NumPy arrays."""
    model, params = make(*which)
    query_positions = (np.zeros(len(columns), int), np.array(columns))
    run = jax.jit(lambda batch: beam_search(model.bind(params), batch, query_positions, num_beams))
    return tuple(np.asarray(x) for x in run(packed()))


def every_item(which, column):
    """Returns f32[V], log p(item | history up to `column`), each by a full forward pass."""
    num_items, loss = which[0], losses(*which)
    targets = np.zeros((num_items, 1, MAX_LEN), np.int32)
    targets[:, 0, column] = 1 + np.arange(num_items)
    return -np.array([float(loss(packed().with_targets(target))) for target in targets])


PLAIN = (20, TigerConfig.norm, TigerConfig.prefix_embeddings)


@pytest.mark.parametrize("which", [PLAIN, (20, "pre", True), (NUM_CODES**LEVELS, "original", True)])
def test_a_wide_beam_ranks_like_scoring_every_item(which):
    items_NK, log_prob_NK = search(which, [4, 7], 100)
    assert items_NK.shape == (2, which[0])
    for column, items, log_probs in zip((4, 7), items_NK, log_prob_NK, strict=True):
        expected = every_item(which, column)
        np.testing.assert_array_equal(items, 1 + np.argsort(-expected))
        np.testing.assert_allclose(log_probs, np.sort(expected)[::-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(log_prob_NK).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("prefix_embeddings, products", [(False, 64), (True, 64), (True, 0)])
def test_children_are_scored_by_their_codes_and_nodes(prefix_embeddings, products, monkeypatch):
    """Log-probabilities equal those computed for one node at a time in NumPy, both by products with all nodes
    and by gathered vectors."""
    monkeypatch.setattr(tiger, "_PRODUCTS", products)
    model, params = make(20, "pre", prefix_embeddings)
    x_ND = np.random.default_rng(2).normal(size=(3, SMALL.width)).astype(np.float32)
    codes_VQ = model.bind(params).semantic_ids.codes_VQ
    prefixes = np.unique(codes_VQ[1:, :1], axis=0)[:3]  # nodes 0, 1 and 2 of level 1
    log_prob_NM = jax.jit(lambda x: model.bind(params).log_probs(x, jnp.arange(3), level=1))(x_ND)
    table = np.asarray(params["code_table"]["embedding"])
    paths = np.unique(codes_VQ[1:, :2], axis=0)
    for x_D, prefix, log_prob_M in zip(x_ND, prefixes, np.asarray(log_prob_NM), strict=True):
        scores = []
        for node, path in enumerate(paths):
            if path[0] == prefix[0]:
                vector = table[1 + NUM_CODES + path[1]]
                if prefix_embeddings:
                    num_first = len(np.unique(codes_VQ[1:, 0]))
                    vector = vector + params["nodes"]["embedding"][1 + num_first + node]
                scores.append(float(x_D @ vector))
        expected = np.array(scores) - np.log(np.exp(scores).sum())
        np.testing.assert_allclose(log_prob_M[: len(expected)], expected, rtol=1e-4, atol=1e-5)
        assert np.all(np.isneginf(log_prob_M[len(expected) :]))


@pytest.mark.parametrize("which", [PLAIN, (20, "pre", True)])
def test_a_narrow_beam_returns_distinct_items_with_their_probabilities(which):
    items_NK, log_prob_NK = search(which, [4], 6)
    assert len(set(items_NK[0])) == 6 and items_NK.min() >= 1 and items_NK.max() <= 20
    assert np.all(np.diff(log_prob_NK[0]) <= 0)
    np.testing.assert_allclose(log_prob_NK[0], every_item(which, 4)[items_NK[0] - 1], rtol=1e-4, atol=1e-5)


def test_targets_do_not_leak_into_predictions():
    """The loss at a column does not depend on the targets of earlier columns and other segments."""

    def loss(targets):
        row = np.zeros((1, MAX_LEN), np.int32)
        row[0, list(targets)] = list(targets.values())
        return float(losses(*PLAIN)(packed().with_targets(row)))

    # Item 5 does follow column 3, so this target adds no information at column 4.
    assert loss({3: 5, 4: 11}) == pytest.approx(loss({3: 5}) + loss({4: 11}), rel=1e-5)
    assert loss({4: 11, 5: 8}) == pytest.approx(loss({4: 11}) + loss({5: 8}), rel=1e-5)


def run_steps(**mesh):
    semantic_ids = numbered_semantic_ids(20, SemanticIdsConfig(codebook_size=NUM_CODES, num_levels=2))
    config = ExperimentConfig(
        data=DataConfig(max_len=MAX_LEN),
        model=dataclasses.replace(SMALL, dropout=0.3),
        mesh=MeshConfig(**mesh),
    )
    build = model_builder(config.model, 20, MAX_LEN, semantic_ids)
    step = make_step(config, define_model(build), np.arange(21), make_mesh(config.mesh), total_steps=3)
    batch = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), packed())
    batch = batch.with_targets(1 + (batch.items + np.arange(4)[:, None]) % 20)
    state = step.init(init_model(build, seed=0)[1])
    for _ in range(3):
        state, metrics = step(state, place_batch(batch, step.mesh))
        yield [float(metrics[name][0]) for name in ("loss", "grad_norm", "tokens")]


def test_steps_are_equal_if_heads_and_channels_are_sharded():
    one_device, sharded = list(run_steps(data=1)), list(run_steps(data=2, model=2))
    np.testing.assert_allclose(sharded, one_device, rtol=1e-4)
    assert one_device[0][2] == 32


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"loss": BCEConfig()}, "loss.type='bce'"),
        ({"table": TableConfig(layout="rows")}, "table=TableConfig.*layout='rows'.*has none"),
        ({"compress": CompressConfig(distill=DistillConfig(("run",)))}, "compress.distill.teachers="),
        ({"precision": PrecisionConfig(output="f32")}, "precision.output='f32'"),
    ],
)
def test_settings_of_an_item_embedding_table_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(model=SMALL, **fields)


def test_invalid_models_are_refused():
    with pytest.raises(ValueError, match="num_heads=3"):
        build(TigerConfig, {"type": "tiger", "width": 8, "num_heads": 3})
    with pytest.raises(ValueError, match="l2_normalize"):
        TigerConfig(l2_normalize=True)
    with pytest.raises(ValueError, match="num_items=21, but there are semantic ids of 20 items"):
        define_model(lambda rngs: Tiger(SMALL, 21, MAX_LEN, semantic_ids=random_semantic_ids(20), rngs=rngs))
