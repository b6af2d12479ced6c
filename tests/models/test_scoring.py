"""Scores of many packed histories against a full forward pass for each."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from packed_rows import pack, random_params

from rec_jax.data.queries import Queries
from rec_jax.mesh import MeshConfig, make_mesh, replicate
from rec_jax.models import scoring
from rec_jax.models.base import define_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.models.scoring import SequenceRanker
from rec_jax.tables.layouts import RowSharded
from rec_jax.tables.tables import Table, Tables

NUM_ITEMS, MAX_LEN = 30, 6
LENGTHS = [1, 3, 6, 7, 20, 2, 1, 5]
OFFSETS = np.cumsum([0, *LENGTHS])
HISTORIES = SimpleNamespace(
    items=np.random.default_rng(0).integers(1, NUM_ITEMS + 1, OFFSETS[-1]).astype(np.int32),
    offsets=OFFSETS,
)
HISTORIES.columns = {"item": HISTORIES.items}
CONFIG = SASRecConfig(width=8, ff_width=8, dropout=0.5)
MODEL = define_model(lambda rngs: SASRec(CONFIG, NUM_ITEMS, MAX_LEN, rngs=rngs))
PARAMS = jax.tree.map(jax.numpy.asarray, random_params(MODEL))


def ranker(devices=1):
    return SequenceRanker(MODEL, PARAMS, MAX_LEN, make_mesh(MeshConfig(data=devices)))


def scores(ranker, users, ends=None):
    return ranker.scores(Queries.of(HISTORIES, users, ends)).whole()


def scores_of(ranker, history):
    return np.asarray(ranker.scores(Queries.one(history)).whole())


def sharded_ranker(data, model):
    """Returns a ranker whose item embedding table is row-sharded."""
    mesh = make_mesh(MeshConfig(data=data, model=model))
    tables = Tables({"items": Table("items/embedding", RowSharded(NUM_ITEMS + 1, mesh), None)})
    dense, whole = tables.split(PARAMS)
    params = tables.join(replicate(dense, mesh), tables.place(whole))
    return SequenceRanker(MODEL, params, MAX_LEN, mesh, tables)


@jax.jit
def forward(batch):
    module = MODEL.bind(PARAMS)
    return module(batch)[0] @ module.item_vectors().T


def expected_scores(history):
    """Returns the scores after the last MAX_LEN events of one history, alone in its row."""
    history = np.asarray(history)[-MAX_LEN:]
    return np.asarray(forward(pack([[history]], length=MAX_LEN)))[len(history) - 1]


def check(scores, histories):
    assert scores.shape == (len(histories), NUM_ITEMS + 1)
    assert np.all(np.asarray(scores[:, 0]) == -np.inf)
    for row, history in zip(np.asarray(scores), histories, strict=True):
        np.testing.assert_allclose(row[1:], expected_scores(history)[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data, model", [(1, 1), (2, 4)])
def test_a_sharded_table_gives_the_same_scores(data, model):
    users = np.arange(len(LENGTHS))
    sharded = sharded_ranker(data, model)
    np.testing.assert_allclose(scores(sharded, users), scores(ranker(), users), rtol=1e-5, atol=1e-6)
    one, other = scores_of(sharded, [3, 1, 2]), scores_of(ranker(), [3, 1, 2])
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# All rows at once on one device; one row at a time on each of four devices.
@pytest.mark.parametrize("devices, tokens", [(1, 12_800), (4, MAX_LEN)])
def test_scores_of_many_histories_equal_those_of_each_in_order(devices, tokens, monkeypatch):
    monkeypatch.setattr(scoring, "_ENCODE_TOKENS", tokens)
    # Users in any order and more than once, with all events or without the last ones.
    users = np.array([4, 0, 7, 4, 2, 3, 1, 5, 6, 4])
    ends = OFFSETS[users] + np.array([20, 1, 5, 9, 6, 7, 2, 1, 1, 1])
    histories = [HISTORIES.items[OFFSETS[u] : end] for u, end in zip(users, ends, strict=True)]
    check(scores(ranker(devices), users, ends), histories)


def test_a_single_history_of_given_items():
    for history in ([3], [1, 2, 3, 4, 5, 6], list(range(1, 20))):
        check(scores_of(ranker(), history), [history])


def test_only_the_last_max_len_events_are_used():
    model = ranker()
    a, b = scores_of(model, [9, 9, *range(1, 7)]), scores_of(model, [*range(1, 7)])
    np.testing.assert_array_equal(a, b)
    assert np.any(a != scores_of(model, [9, *range(2, 7)]))


def test_events_after_the_history_are_not_used():
    before = Queries.of(HISTORIES, [4], OFFSETS[[4]] + 4)
    changed = HISTORIES.items.copy()
    changed[before.ends[0] :] = changed[before.ends[0] :] % NUM_ITEMS + 1
    after = Queries({"item": changed}, before.starts, before.ends)
    scores = (ranker().scores(queries).whole() for queries in (before, after))
    np.testing.assert_array_equal(*scores)


def test_scores_of_the_first_dims_are_dot_products_of_the_first_dims():
    users = np.arange(len(LENGTHS))
    prefix_ranker = SequenceRanker(MODEL, PARAMS, MAX_LEN, make_mesh(MeshConfig(data=1)), dims=3)
    x_BD = np.stack([query_vector(user)[:3] for user in users])
    expected = x_BD @ np.asarray(PARAMS["items"]["embedding"])[:, :3].T
    np.testing.assert_allclose(scores(prefix_ranker, users)[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)


def query_vector(user):
    """Returns the query vector after the whole history of a user, which follows from the scores of all
    items."""
    table_VD = np.asarray(PARAMS["items"]["embedding"], np.float64)
    scores_V = expected_scores(HISTORIES.items[OFFSETS[user] : OFFSETS[user + 1]])
    return np.linalg.lstsq(table_VD, scores_V, rcond=None)[0]
