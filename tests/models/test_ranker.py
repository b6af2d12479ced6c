"""Properties that every ranker must have, for evaluation and recommendation, against loops over its
scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import random_params

from rec_jax.compress.quant import QuantConfig, quantize_params
from rec_jax.data.batch import Batch
from rec_jax.data.histories import build_histories, examples, leave_one_out
from rec_jax.data.queries import Queries
from rec_jax.data.simulator import SimulatorConfig, World
from rec_jax.eval.ensemble import EnsembleRanker
from rec_jax.mesh import MeshConfig, make_mesh, replicate
from rec_jax.models.base import define_model
from rec_jax.models.baselines import BASELINES
from rec_jax.models.beam import BeamRanker
from rec_jax.models.bert4rec import BERT4RecConfig
from rec_jax.models.ranker import ScoreRanker
from rec_jax.models.registry import model_builder
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.models.scoring import SequenceRanker, top_items
from rec_jax.models.semantic_ids import SemanticIdsConfig, numbered_semantic_ids
from rec_jax.models.tiger import TigerConfig
from rec_jax.nn.quantized import QuantizedTable
from rec_jax.objectives.catalogue import Catalogue
from rec_jax.tables.layouts import RowSharded
from rec_jax.tables.tables import Table, Tables

NUM_ITEMS, MAX_LEN = 24, 8
WORLD = World(SimulatorConfig(num_items=NUM_ITEMS, num_users=14, num_interests=3, mean_len=7, min_len=3))
HISTORIES = build_histories(WORLD.sample())
SPLIT = leave_one_out(HISTORIES)
EXAMPLES = examples(HISTORIES, SPLIT, "test")
QUERIES = Queries.of(HISTORIES, EXAMPLES.users, EXAMPLES.ends)
RNG = np.random.default_rng(0)
SAMPLED = np.argsort(RNG.random((len(QUERIES), NUM_ITEMS)))[:, :5] + 1  # five distinct items each


@functools.cache  # tests of one model share its programs
def random_model(config, **options):
    model = define_model(model_builder(config, NUM_ITEMS, MAX_LEN, **options))
    return model, jax.tree.map(jnp.asarray, random_params(model))


def sasrec():
    return random_model(SASRecConfig(width=8, ff_width=8, num_layers=1, dropout=0.0))


def sequence(change=lambda params: params, **options):
    model, params = sasrec()
    return SequenceRanker(model, change(params), MAX_LEN, make_mesh(MeshConfig(data=2)), **options)


def row_sharded():
    mesh, (model, params) = make_mesh(MeshConfig(data=2, model=4)), sasrec()
    tables = Tables({"items": Table("items/embedding", RowSharded(NUM_ITEMS + 1, mesh), None)})
    dense, whole = tables.split(params)
    params = tables.join(replicate(dense, mesh), tables.place(whole))
    return SequenceRanker(model, params, MAX_LEN, mesh, tables)


def beam():
    config = TigerConfig(width=8, ff_width=8, num_heads=2, num_layers=1, dropout=0.0)
    semantic_ids = numbered_semantic_ids(NUM_ITEMS, SemanticIdsConfig(codebook_size=3, num_levels=2))
    model, params = random_model(config, semantic_ids=semantic_ids)
    return BeamRanker(model, params, NUM_ITEMS, MAX_LEN, make_mesh(MeshConfig(data=2)), num_beams=7)


QUANTIZED = QuantConfig(names=".*(kernel|embedding)")
RANKERS = {name: functools.partial(baseline, HISTORIES, SPLIT) for name, baseline in BASELINES.items()} | {
    "oracle": lambda: ScoreRanker(WORLD.oracle(HISTORIES)),
    "sequence": sequence,
    "first dims": lambda: sequence(dims=3),
    "quantized": lambda: sequence(lambda params: quantize_params(params, QUANTIZED)),
    "row-sharded": row_sharded,
    "beam search": beam,
    "ensemble": lambda: EnsembleRanker([row_sharded(), BASELINES["bigram"](HISTORIES, SPLIT)]),
}


@pytest.fixture(scope="module", params=RANKERS)
def ranker(request):
    return RANKERS[request.param]()


def history(row):
    """Returns the items of a history, as a set."""
    return set(HISTORIES.items[QUERIES.starts[row] : QUERIES.ends[row]].tolist())


@pytest.mark.parametrize("filter_seen", [True, False])
def test_ranks_equal_a_loop_over_scores(ranker, filter_seen):
    scores_BV = np.asarray(ranker.scores(QUERIES).whole())
    assert scores_BV.shape == (len(QUERIES), NUM_ITEMS + 1) and np.all(scores_BV[:, 0] == -np.inf)
    ranks = ranker.rank(QUERIES, EXAMPLES.targets, top_k=6, filter_seen=filter_seen, sampled_ids=SAMPLED)
    ranks = jax.device_get(ranks)
    assert not ranks.num_nan.any()
    for row, target in enumerate(EXAMPLES.targets):
        scores, target_score = scores_BV[row], scores_BV[row, target]
        others = [v for v in range(1, NUM_ITEMS + 1) if v != target]
        unseen = [v for v in others if v not in history(row)]
        for rivals, greater, equal in (
            (unseen, ranks.greater, ranks.equal),
            (others, ranks.greater_unfiltered, ranks.equal_unfiltered),
            (SAMPLED[row], ranks.sampled_greater, ranks.sampled_equal),
        ):
            assert greater[row] == np.sum(scores[rivals] > target_score)
            assert equal[row] == 1 + np.sum(scores[rivals] == target_score)
        check_list(ranks.top_BK[row], scores, [target, *(unseen if filter_seen else others)], 6)


def check_list(ids, scores, candidates, k):
    """Checks that ids are the k best candidates, best first; equal scores may be in any order."""
    items = [v for v in ids.tolist() if v]
    assert len(set(items)) == len(items) == min(k, len(candidates)) and set(items) <= set(candidates)
    assert not ids[len(items) :].any()
    np.testing.assert_array_equal(scores[items], np.sort(scores[candidates])[::-1][: len(items)])


@pytest.mark.parametrize(
    "k, excludes, restricts",
    [(5, True, False), (NUM_ITEMS, False, True), (NUM_ITEMS + 9, True, True), (NUM_ITEMS + 9, False, False)],
)
def test_the_best_items_equal_a_sort_of_scores(ranker, k, excludes, restricts):
    scores_BV = np.asarray(ranker.scores(QUERIES).whole())
    allowed = np.arange(NUM_ITEMS + 1) % 3 > 0
    exclude = QUERIES.seen() if excludes else None
    best_BK, ids_BK = jax.device_get(ranker.top_k(QUERIES, k, exclude, allowed if restricts else None))
    assert best_BK.shape == ids_BK.shape == (len(QUERIES), k)
    for row, scores in enumerate(scores_BV):
        candidates = [v for v in range(1, NUM_ITEMS + 1) if allowed[v] or not restricts]
        candidates = [v for v in candidates if not (excludes and v in history(row))]
        check_list(ids_BK[row], scores, [v for v in candidates if scores[v] > -np.inf], k)
        expected = np.where(ids_BK[row] > 0, scores[ids_BK[row]], -np.inf)
        np.testing.assert_array_equal(best_BK[row], expected)


def test_scores_of_a_query_do_not_depend_on_other_queries(ranker):
    scores_BV = np.asarray(ranker.scores(QUERIES).whole())
    for row in (0, 5):
        alone = np.asarray(ranker.scores(QUERIES[row : row + 1]).whole())
        np.testing.assert_allclose(alone[0], scores_BV[row], rtol=1e-4, atol=1e-5)


def test_a_catalogue_scores_all_items_and_lists_the_best():
    model, params = sasrec()
    table_VD = np.asarray(params["items"]["embedding"])
    x_BD = RNG.normal(size=(3, 8)).astype(np.float32)
    catalogue, expected = Catalogue(jnp.asarray(table_VD)), x_BD @ table_VD[1:].T
    np.testing.assert_allclose(catalogue.scores(x_BD).whole()[:, 1:], expected, rtol=1e-5, atol=1e-6)
    layout = RowSharded(NUM_ITEMS + 1, make_mesh(MeshConfig(data=4, model=2)))
    sharded = Catalogue(layout.place(jnp.asarray(table_VD)), layout.placement, layout.mesh)
    np.testing.assert_allclose(sharded.scores(x_BD).whole()[:, 1:], expected, rtol=1e-5, atol=1e-6)
    order = 1 + np.argsort(-expected)[:, :4]
    for each in (catalogue, sharded):
        np.testing.assert_array_equal(each.scores(x_BD).top_k(4)[1], order)


def test_padding_is_not_listed():
    codes = jnp.full((4, 2), -100, jnp.int8).at[0].set(127)
    table = QuantizedTable(codes, jnp.ones(4, jnp.bfloat16), None, 8, 2)
    for vectors in (table, table.dequantize()):
        _, ids = Catalogue(vectors).scores(jnp.ones((1, 2))).top_k(4)
        assert sorted(np.asarray(ids)[0].tolist()) == [0, 1, 2, 3] and ids[0, 3] == 0


@pytest.mark.parametrize("config_class", [SASRecConfig, BERT4RecConfig])  # causal, and with a query token
def test_top_items_equal_those_of_a_ranker(config_class):
    model, params = random_model(config_class(width=8, ff_width=8, num_layers=1, dropout=0.0))
    items = np.array([[3, 1, 7, 0], [5, 0, 0, 0]], np.int32)
    batch = Batch({"item": items}, (items > 0).astype(np.int32), np.arange(4) * (items > 0))
    best_BK, ids_BK = top_items(model, params, batch, 5)
    ranker = SequenceRanker(model, params, MAX_LEN, make_mesh(MeshConfig(data=1)))
    for row, history in enumerate(([3, 1, 7], [5])):
        scores, ids = ranker.top_k(Queries.one(history), 5)
        np.testing.assert_array_equal(ids_BK[row], ids[0])
        np.testing.assert_allclose(best_BK[row], scores[0], rtol=1e-4, atol=1e-5)
