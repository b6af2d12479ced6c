"""Scores of many packed histories against one full forward pass each."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from packed_rows import pack

from rec_jax.data.queries import Queries
from rec_jax.mesh import MeshConfig, make_mesh, replicate
from rec_jax.models import scoring
from rec_jax.models.base import init_model
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
MODEL, PARAMS = init_model(lambda rngs: SASRec(CONFIG, NUM_ITEMS, MAX_LEN, rngs=rngs), seed=0)
PARAMS = jax.tree.map(lambda x: x * 3, PARAMS)


def ranker(devices=1):
    return SequenceRanker(MODEL, PARAMS, MAX_LEN, make_mesh(MeshConfig(data=devices)))


def scores(ranker, users, ends=None):
    return ranker.scores(Queries.of(HISTORIES, users, ends)).whole()


def scores_of(ranker, history):
    return np.asarray(ranker.scores(Queries.one(history)).whole())


def sharded_ranker(data, model):
    """The table is row-sharded over a mesh."""
    mesh = make_mesh(MeshConfig(data=data, model=model))
    tables = Tables({"items": Table("items/embedding", RowSharded(NUM_ITEMS + 1, mesh), None)})
    dense, whole = tables.split(PARAMS)
    params = tables.join(replicate(dense, mesh), tables.place(whole))
    return SequenceRanker(MODEL, params, MAX_LEN, mesh, tables)


@jax.jit
def forward(batch):
    module = MODEL.bind(PARAMS)
    return module(batch)[0] @ module.item_vectors().T


def slow(history):
    """Scores after the last MAX_LEN events of one history, alone in its row."""
    history = np.asarray(history)[-MAX_LEN:]
    return np.asarray(forward(pack([[history]], length=MAX_LEN)))[len(history) - 1]


def check(scores, histories):
    assert scores.shape == (len(histories), NUM_ITEMS + 1)
    assert np.all(np.asarray(scores[:, 0]) == -np.inf)
    for row, history in zip(np.asarray(scores), histories, strict=True):
        np.testing.assert_allclose(row[1:], slow(history)[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data, model", [(1, 1), (8, 1), (2, 4)])
def test_a_sharded_table_gives_the_same_scores(data, model):
    users = np.arange(len(LENGTHS))
    sharded = sharded_ranker(data, model)
    np.testing.assert_allclose(scores(sharded, users), scores(ranker(), users), rtol=1e-5, atol=1e-6)
    one, other = scores_of(sharded, [3, 1, 2]), scores_of(ranker(), [3, 1, 2])
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("tokens", [12_800, MAX_LEN])  # all rows at once, or one row a device at a time
def test_many_histories_equal_each_alone_in_the_order_asked_for(devices, tokens, monkeypatch):
    monkeypatch.setattr(scoring, "_ENCODE_TOKENS", tokens)
    # Users out of order and more than once, whole and cut short.
    users = np.array([4, 0, 7, 4, 2, 3, 1, 5, 6, 4])
    ends = OFFSETS[users] + np.array([20, 1, 5, 9, 6, 7, 2, 1, 1, 1])
    histories = [HISTORIES.items[OFFSETS[u] : end] for u, end in zip(users, ends, strict=True)]
    check(scores(ranker(devices), users, ends), histories)


def test_one_given_history():
    for history in ([3], [1, 2, 3, 4, 5, 6], list(range(1, 20))):
        check(scores_of(ranker(), history), [history])


def test_only_the_last_events_count():
    model = ranker()
    a, b = scores_of(model, [9, 9, *range(1, 7)]), scores_of(model, [*range(1, 7)])
    np.testing.assert_array_equal(a, b)
    assert np.any(a != scores_of(model, [9, *range(2, 7)]))


def test_what_follows_the_end_does_not_count():
    before = Queries.of(HISTORIES, [4], OFFSETS[[4]] + 4)
    changed = HISTORIES.items.copy()
    changed[before.ends[0] :] = changed[before.ends[0] :] % NUM_ITEMS + 1
    after = Queries({"item": changed}, before.starts, before.ends)
    scores = (ranker().scores(queries).whole() for queries in (before, after))
    np.testing.assert_array_equal(*scores)


def test_the_first_dims_score_like_vectors_of_that_size():
    users = np.arange(len(LENGTHS))
    cut = SequenceRanker(MODEL, PARAMS, MAX_LEN, make_mesh(MeshConfig(data=1)), dims=3)
    x_BD = np.stack([forward_queries(user)[:3] for user in users])
    expected = x_BD @ np.asarray(PARAMS["items"]["embedding"])[:, :3].T
    np.testing.assert_allclose(scores(cut, users)[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)


def forward_queries(user):
    """What the model says after the whole history of a user: scores of as many items give it back."""
    table_VD = np.asarray(PARAMS["items"]["embedding"], np.float64)
    scores_V = slow(HISTORIES.items[OFFSETS[user] : OFFSETS[user + 1]])
    return np.linalg.lstsq(table_VD, scores_V, rcond=None)[0]
