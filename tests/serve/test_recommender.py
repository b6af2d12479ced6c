"""Recommendations of small untrained models: their scores suffice to test how lists are made from scores."""

import copy
import csv
import dataclasses
import functools
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet
import pytest

import rec_jax
from rec_jax import trained
from rec_jax.data.datasets import Dataset
from rec_jax.data.histories import Histories, leave_one_out
from rec_jax.data.queries import Queries
from rec_jax.data.schema import make_schema
from rec_jax.models.base import init_model
from rec_jax.models.hstu import HSTUConfig
from rec_jax.models.registry import model_builder
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.models.semantic_ids import SemanticIdsConfig, numbered_semantic_ids
from rec_jax.models.tiger import TigerConfig
from rec_jax.serve import lists
from rec_jax.serve import recommender as recommend

NUM_ITEMS, MAX_LEN = 30, 4
RNG = np.random.default_rng(0)
LENGTHS = np.array([3, 9, 5, 4, 29])
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])
# The last user has all items except item 30, which no user has, so that it is in no training event.
ITEMS = np.concatenate([RNG.integers(1, 20, OFFSETS[-2]), RNG.permutation(29) + 1]).astype(np.int32)
HISTORIES = Histories(
    items=ITEMS,
    times=np.arange(len(ITEMS)) * 100,
    offsets=OFFSETS,
    user_ids=np.array([f"u{u}" for u in range(5)], object),
    item_ids=np.array(["", *(f"i{i}" for i in range(1, NUM_ITEMS + 1))], object),
    titles={f"i{i}": f"Item {i}" for i in range(1, 21)},
)
SPLIT = leave_one_out(HISTORIES)
DATASET = Dataset(HISTORIES, SPLIT, [], None, make_schema(HISTORIES, SPLIT))
MODELS = {
    "sasrec": SASRecConfig(num_layers=1, width=8, ff_width=8),
    "hstu": HSTUConfig(num_layers=1, width=8, num_heads=1),
    "tiger": TigerConfig(num_layers=1, width=8, ff_width=8, num_heads=1, num_beams=4),
}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        semantic_ids = (
            numbered_semantic_ids(NUM_ITEMS, SemanticIdsConfig(codebook_size=8)) if name == "tiger" else None
        )
        params = init_model(model_builder(config, NUM_ITEMS, MAX_LEN, semantic_ids), seed=0)[1]
        params = jax.tree.map(lambda x: np.asarray(x) * 5, params)
        about = {
            "data": {"max_len": MAX_LEN}, "model": dataclasses.asdict(config),
            "compress": {"quant": {"aware": False}}, "table": {"layout": "replicated"},
        }  # fmt: skip
        trained.save(folder / name, params, 1, about, DATASET, semantic_ids)
    return folder


@pytest.fixture(scope="module")
def load(workdirs):
    """The function name -> recommender, which loads each model once: tests share compiled functions."""
    return functools.cache(lambda name: rec_jax.load(workdirs / name))


@pytest.fixture(scope="module")
def sasrec(load):
    return load("sasrec")


def ids(recommendations) -> list[str]:
    return [item.item_id for item in recommendations]


def sorted_ids(recommender, items, seen, k, allowed=range(1, NUM_ITEMS + 1)):
    """Reference for a list: sorts the scores of all items."""
    scores = np.asarray(recommender.model.ranker().scores(Queries.one(items)).whole()[0])
    order = [item for item in np.argsort(-scores, kind="stable") if item in allowed and item not in seen]
    return [f"i{item}" for item in order[:k]]


def test_a_list_after_a_history_has_the_best_unseen_items(sasrec):
    best = sasrec.recommend(["i3", "i1", "i3"], k=7)
    assert ids(best) == sorted_ids(sasrec, [3, 1, 3], {1, 3}, 7)
    assert best[0].title == (f"Item {best[0].item_id[1:]}" if int(best[0].item_id[1:]) <= 20 else "")
    assert best.history == (("i3", "Item 3"), ("i1", "Item 1"), ("i3", "Item 3"))
    assert str(best).startswith("the 7 best next items:\n   1  score ")
    with_seen = sasrec.recommend(["i3", "i1", "i3"], k=7, seen=True)
    assert ids(with_seen) == sorted_ids(sasrec, [3, 1, 3], set(), 7)


def test_a_list_for_a_user_leaves_out_all_items_that_the_user_has_seen(sasrec):
    for user in range(4):
        events = ITEMS[OFFSETS[user] : OFFSETS[user + 1]]
        best = sasrec.recommend(user=f"u{user}", k=5)
        assert ids(best) == sorted_ids(sasrec, events[-MAX_LEN:], set(events), 5)
        assert len(best.history) == min(len(events), MAX_LEN)


def test_a_short_list_says_why(sasrec):
    one = sasrec.recommend(user="u4", k=5)
    assert ids(one) == ["i30"]
    assert "no other items are left of 30: 29 are in the history (seen=True" in str(one)
    all_items = [f"i{i}" for i in range(1, 31)]
    none = sasrec.recommend(all_items)
    assert str(none) == (
        "nothing to recommend\nnote: all 30 items are in the history (seen=True recommends them again)"
    )
    assert len(sasrec.recommend(all_items, seen=True)) == 10
    short = sasrec.recommend(["i1"], candidates=sasrec.candidates(allow=["i1", "i2", "i3"]))
    assert ids(short) == sorted_ids(sasrec, [1], {1}, 10, {2, 3})
    assert "3 are allowed, 1 are in the history" in str(short)
    assert len(sasrec.recommend(["i1"], k=100)) == 29


def test_untrained_items_are_noted_or_left_out(sasrec):
    counts = SPLIT.train_item_counts(HISTORIES)
    whole = sasrec.recommend(["i1"], k=30)
    assert "i30" in ids(whole)
    assert f"{(counts[2:] == 0).sum()} of the 29 items have no training event, so their" in str(whole)
    trained_only = sasrec.recommend(["i1"], k=30, candidates=sasrec.candidates(trained_only=True))
    assert set(ids(trained_only)) == {f"i{i}" for i in range(2, 31) if counts[i]}
    assert "have no training event" in str(trained_only) and "so their" not in str(trained_only)


def test_allowed_and_denied_items(sasrec):
    candidates = sasrec.candidates(allow=["i2", "i4", "nope", "i6"], deny=["i4", "never"])
    best = sasrec.recommend(["i1"], candidates=candidates)
    assert ids(best) == sorted_ids(sasrec, [1], {1}, 10, {2, 6})
    assert "1 of 4 ids to allow are unknown: 'nope'" in str(best)
    assert "1 of 2 ids to deny are unknown: 'never'" in str(best)
    with pytest.raises(ValueError, match="no item is left to recommend: 0 are allowed, 1 of 1 ids .*'x'"):
        sasrec.candidates(allow=["x"])


def test_unknown_ids_are_an_error_or_skipped(sasrec):
    with pytest.raises(ValueError, match="unknown item ids.*'i99', 'x'; similar to 'i99'.*skip_unknown"):
        sasrec.recommend(["i1", "i99", "i2", "x"])
    best = sasrec.recommend(["i1", "i99", "i2", "x"], times=[1, 2, 3, 4], skip_unknown=True)
    assert ids(best) == ids(sasrec.recommend(["i1", "i2"]))
    assert "2 unknown ids of the history were skipped: 'i99', 'x'" in str(best)
    with pytest.raises(ValueError, match="the history is empty"):
        sasrec.recommend(["x"], skip_unknown=True)
    with pytest.raises(ValueError, match="unknown user ids.*'u9'"):
        sasrec.recommend(user="u9")
    with pytest.raises(ValueError, match="either a history of item ids or a user"):
        sasrec.recommend(["i1"], user="u1")


def test_times_are_read_relative_to_each_other(sasrec, load):
    hstu = load("hstu")
    history = ["i1", "i2", "i3"]
    without = hstu.recommend(history)
    assert "none were given: all events count as simultaneous" in str(without)
    assert without.items == hstu.recommend(history, times=[5, 5, 5]).items
    late = hstu.recommend(history, times=[0, 100_000, 90_000_000])
    assert late.items != without.items and "simultaneous" not in str(late)
    assert late.items == hstu.recommend(history, times=[9, 100_009, 90_000_009]).items
    assert "times were ignored" in str(sasrec.recommend(history, times=[1, 2, 3]))
    with pytest.raises(ValueError, match="times has 2 values for a history of 3 events"):
        hstu.recommend(history, times=[1, 2])
    with pytest.raises(ValueError, match="times must not decrease"):
        hstu.recommend(history, times=[1, 3, 2])


def test_a_beam_search_has_enough_beams_for_the_list_and_the_seen_items(load, monkeypatch):
    tiger = load("tiger")  # model.num_beams=4
    best = tiger.recommend(user="u1", k=20)
    seen = {f"i{i}" for i in ITEMS[OFFSETS[1] : OFFSETS[2]]}
    assert len(best) == 20 and not seen & set(ids(best))
    scores = [item.score for item in best]
    assert scores == sorted(scores, reverse=True)
    monkeypatch.setattr(recommend, "_MAX_BEAMS", 16)
    few = tiger.recommend(user="u1", k=20)
    assert 0 < len(few) <= 16 and f"the beam search with 16 beams found only {len(few)} items" in str(few)


def test_an_ensemble_averages_the_scores_of_its_models(sasrec, load, workdirs):
    both = recommend.Recommender([sasrec.model, load("hstu").model])
    assert len(both.recommend(user="u0")) == 10
    twice = recommend.Recommender([sasrec.model, sasrec.model])
    assert ids(twice.recommend(user="u0")) == ids(sasrec.recommend(user="u0"))
    with pytest.raises(ValueError, match="scores cannot be averaged with others"):
        rec_jax.load(workdirs / "sasrec", workdirs / "tiger")


@pytest.mark.parametrize("name, suffix", [("sasrec", "csv"), ("hstu", "parquet"), ("tiger", "parquet")])
def test_lists_for_many_users_equal_the_list_for_each_user(load, tmp_path, monkeypatch, name, suffix):
    monkeypatch.setattr(recommend, "_MAX_BATCH", 2)
    recommender = load(name)
    path, k = tmp_path / f"lists.{suffix}", 8
    counts = lists.write_lists(path, recommender, np.array([3, 0, 4, 1, 2]), k)
    if suffix == "parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    assert [row["user"] for row in rows] == ["u3"] * k + ["u0"] * k + ["u4"] + ["u1"] * k + ["u2"] * k
    for user in range(5):
        alone = recommender.recommend(user=f"u{user}", k=k)
        listed = [row for row in rows if row["user"] == f"u{user}"]
        assert [(row["item"], row["title"]) for row in listed] == [(x.item_id, x.title) for x in alone]
        assert [int(row["rank"]) for row in listed] == list(range(1, len(alone) + 1))
        np.testing.assert_allclose(
            [float(row["score"]) for row in listed], [x.score for x in alone], rtol=1e-5
        )
    assert (counts["users"], counts["rows"], counts["short"]) == (5, 33, 1) and counts["untrained"] >= 1


def test_a_failed_writer_leaves_the_old_file(sasrec, tmp_path, monkeypatch):
    path = tmp_path / "lists.csv"
    path.write_text("old lists")
    monkeypatch.setattr(recommend, "_MAX_BATCH", 1)

    def broken(self, queries, *args, real=recommend.Recommender._top_k):
        if queries.users[0] == 2:
            raise ValueError("NaN")
        return real(self, queries, *args)

    monkeypatch.setattr(recommend.Recommender, "_top_k", broken)
    with pytest.raises(ValueError, match="NaN"):
        lists.write_lists(path, sasrec, np.arange(5), 3)
    assert [x.name for x in tmp_path.iterdir()] == ["lists.csv"] and path.read_text() == "old lists"
    with pytest.raises(ValueError, match="must end in .parquet or .csv"):
        lists.write_lists(tmp_path / "lists.txt", sasrec, np.arange(5), 3)


def test_recommending_does_not_import_packages_that_only_training_needs(workdirs):
    """Slow imports would delay the first list by seconds."""
    slow_imports = "grain orbax matplotlib pyarrow tensorboardX scipy qwix tqdm rec_jax.experiment"
    code = (
        f"import sys, rec_jax; print(rec_jax.load({str(workdirs / 'sasrec')!r}).recommend(['i1', 'i2']));"
        f"print('imported:', *set({slow_imports.split()}) & set(sys.modules))"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "the 10 best next items" in done.stdout and "imported:\n" in done.stdout, done.stdout + done.stderr


def test_nan_scores_are_an_error(sasrec):
    model = copy.copy(sasrec.model)
    model.__dict__["params"] = jax.tree.map(lambda x: np.full_like(x, np.nan), model.params)
    with pytest.raises(ValueError, match="NaN among the scores"):
        recommend.Recommender([model]).recommend(user="u0")
