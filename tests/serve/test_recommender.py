"""Lists of a small untrained model, whose scores are as good as any to choose by."""

import csv
import dataclasses
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
# The last user has had all items but item 30, which nobody has, so that it is in no training event.
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
    "sasrec": SASRecConfig(width=8, ff_width=8),
    "hstu": HSTUConfig(width=8, num_heads=1),
    "tiger": TigerConfig(width=8, ff_width=8, num_heads=1, num_beams=4),
}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        semantic_ids = (
            numbered_semantic_ids(NUM_ITEMS, SemanticIdsConfig(codebook_size=8)) if name == "tiger" else None
        )
        params = init_model(model_builder(config, NUM_ITEMS, MAX_LEN, semantic_ids), seed=0)[1]
        params = jax.tree.map(lambda x: x * 5, params)
        about = {
            "data": {"max_len": MAX_LEN}, "model": dataclasses.asdict(config),
            "compress": {"quant": {"aware": False}}, "table": {"layout": "replicated"},
        }  # fmt: skip
        trained.save(folder / name, params, 1, about, DATASET, semantic_ids)
    return folder


@pytest.fixture(scope="module")
def sasrec(workdirs):
    return rec_jax.load(workdirs / "sasrec")


def ids(found) -> list[str]:
    return [item.item_id for item in found]


def slow(recommender, items, seen, k, allowed=range(1, NUM_ITEMS + 1)):
    """The same by sorting all scores."""
    scores = np.asarray(recommender.model.ranker().scores(Queries.one(items)).whole()[0])
    order = [item for item in np.argsort(-scores, kind="stable") if item in allowed and item not in seen]
    return [f"i{item}" for item in order[:k]]


def test_a_history(sasrec):
    found = sasrec.recommend(["i3", "i1", "i3"], k=7)
    assert ids(found) == slow(sasrec, [3, 1, 3], {1, 3}, 7)
    assert found[0].title == (f"Item {found[0].item_id[1:]}" if int(found[0].item_id[1:]) <= 20 else "")
    assert found.history == (("i3", "Item 3"), ("i1", "Item 1"), ("i3", "Item 3"))
    assert str(found).startswith("the 7 best next items:\n   1  score ")
    again = sasrec.recommend(["i3", "i1", "i3"], k=7, seen=True)
    assert ids(again) == slow(sasrec, [3, 1, 3], set(), 7)


def test_users_are_spared_what_they_had_before_the_last_events(sasrec):
    for user in range(4):
        events = ITEMS[OFFSETS[user] : OFFSETS[user + 1]]
        found = sasrec.recommend(user=f"u{user}", k=5)
        assert ids(found) == slow(sasrec, events[-MAX_LEN:], set(events), 5)
        assert len(found.history) == min(len(events), MAX_LEN)


def test_where_few_or_none_are_left_it_says_why(sasrec):
    one = sasrec.recommend(user="u4", k=5)
    assert ids(one) == ["i30"]
    assert "no more are left of 30 items: 29 are in the history (seen=True" in str(one)
    everything = [f"i{i}" for i in range(1, 31)]
    none = sasrec.recommend(everything)
    assert str(none) == (
        "nothing to recommend\nall 30 items are in the history (seen=True recommends them again)"
    )
    assert len(sasrec.recommend(everything, seen=True)) == 10
    short = sasrec.recommend(["i1"], candidates=sasrec.candidates(allow=["i1", "i2", "i3"]))
    assert ids(short) == slow(sasrec, [1], {1}, 10, {2, 3})
    assert "3 are allowed, 1 are in the history" in str(short)
    assert len(sasrec.recommend(["i1"], k=100)) == 29


def test_items_without_training(sasrec):
    assert "i30" in ids(sasrec.recommend(["i1"], k=30))
    num_cold = int((SPLIT.train_item_counts(HISTORIES)[2:] == 0).sum())
    assert f"{num_cold} of the 29 items without a training event" in str(sasrec.recommend(["i1"], k=30))
    known = sasrec.recommend(["i1"], k=30, candidates=sasrec.candidates(trained_only=True))
    counts = SPLIT.train_item_counts(HISTORIES)
    assert set(ids(known)) == {f"i{i}" for i in range(2, 31) if counts[i]}
    assert "have no training event" in str(known) and "without a training event" not in str(known)


def test_lists_to_allow_and_deny(sasrec):
    candidates = sasrec.candidates(allow=["i2", "i4", "nope", "i6"], deny=["i4", "never"])
    found = sasrec.recommend(["i1"], candidates=candidates)
    assert ids(found) == slow(sasrec, [1], {1}, 10, {2, 6})
    assert "1 of 4 ids to allow are unknown: 'nope'" in str(found)
    assert "1 of 2 ids to deny are unknown: 'never'" in str(found)
    with pytest.raises(ValueError, match="no item is left to recommend: 0 are allowed, 1 of 1 ids .*'x'"):
        sasrec.candidates(allow=["x"])


def test_unknown_ids(sasrec):
    with pytest.raises(ValueError, match="unknown item ids.*'i99', 'x'; near 'i99'.*skip_unknown"):
        sasrec.recommend(["i1", "i99", "i2", "x"])
    found = sasrec.recommend(["i1", "i99", "i2", "x"], times=[1, 2, 3, 4], skip_unknown=True)
    assert ids(found) == ids(sasrec.recommend(["i1", "i2"]))
    assert "2 unknown ids of the history were skipped: 'i99', 'x'" in str(found)
    with pytest.raises(ValueError, match="the history is empty"):
        sasrec.recommend(["x"], skip_unknown=True)
    with pytest.raises(ValueError, match="unknown user ids.*'u9'"):
        sasrec.recommend(user="u9")
    with pytest.raises(ValueError, match="either a history of item ids or a user"):
        sasrec.recommend(["i1"], user="u1")


def test_times(sasrec, workdirs):
    hstu = rec_jax.load(workdirs / "hstu")
    history = ["i1", "i2", "i3"]
    without = hstu.recommend(history)
    assert "none were given: all events count as simultaneous" in str(without)
    assert without.items == hstu.recommend(history, times=[5, 5, 5]).items
    late = hstu.recommend(history, times=[0, 100_000, 90_000_000])
    assert late.items != without.items and "simultaneous" not in str(late)
    assert late.items == hstu.recommend(history, times=[9, 100_009, 90_000_009]).items
    assert "reads no times" in str(sasrec.recommend(history, times=[1, 2, 3]))
    with pytest.raises(ValueError, match="2 of them for a history of 3"):
        hstu.recommend(history, times=[1, 2])
    with pytest.raises(ValueError, match="times must not decrease"):
        hstu.recommend(history, times=[1, 3, 2])


def test_a_search_has_beams_enough_for_the_list_and_the_history(workdirs, monkeypatch):
    tiger = rec_jax.load(workdirs / "tiger")  # 4 beams
    found = tiger.recommend(user="u1", k=15)
    had = {f"i{i}" for i in ITEMS[OFFSETS[1] : OFFSETS[2]]}
    assert len(found) == 15 and not had & set(ids(found))
    scores = [item.score for item in found]
    assert scores == sorted(scores, reverse=True)
    monkeypatch.setattr(recommend, "_MAX_BEAMS", 8)
    few = rec_jax.load(workdirs / "tiger").recommend(user="u1", k=15)
    assert 0 < len(few) <= 8 and "a search with 8 beams found no more than" in str(few)


def test_an_ensemble(sasrec, workdirs):
    both = rec_jax.load(workdirs / "sasrec", workdirs / "hstu")
    assert len(both.recommend(user="u0")) == 10
    twice = rec_jax.load(workdirs / "sasrec", workdirs / "sasrec")
    assert ids(twice.recommend(user="u0")) == ids(sasrec.recommend(user="u0"))
    with pytest.raises(ValueError, match="has no mean with others"):
        rec_jax.load(workdirs / "sasrec", workdirs / "tiger")


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("name", MODELS)
def test_many_users_get_what_each_gets_alone(workdirs, tmp_path, monkeypatch, name, suffix):
    monkeypatch.setattr(recommend, "_MAX_BATCH", 2)
    recommender = rec_jax.load(workdirs / name)
    path = tmp_path / f"lists.{suffix}"
    counts = lists.write_lists(path, recommender, np.array([3, 0, 4, 1, 2]), 5)
    if suffix == "parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    assert [row["user"] for row in rows] == ["u3"] * 5 + ["u0"] * 5 + ["u4"] + ["u1"] * 5 + ["u2"] * 5
    for user in range(5):
        alone = recommender.recommend(user=f"u{user}", k=5)
        mine = [row for row in rows if row["user"] == f"u{user}"]
        assert [(row["item"], row["title"]) for row in mine] == [(x.item_id, x.title) for x in alone]
        assert [int(row["rank"]) for row in mine] == list(range(1, len(alone) + 1))
        np.testing.assert_allclose([float(row["score"]) for row in mine], [x.score for x in alone], rtol=1e-5)
    assert counts["users"] == 5 and counts["rows"] == 21 and counts["short"] == 1 and counts["untrained"] >= 1


def test_a_file_appears_when_it_is_complete(sasrec, tmp_path, monkeypatch):
    path = tmp_path / "lists.csv"
    path.write_text("of yesterday")
    monkeypatch.setattr(recommend, "_MAX_BATCH", 1)

    def broken(self, queries, *args, real=recommend.Recommender._top_k):
        if queries.users[0] == 2:
            raise ValueError("NaN")
        return real(self, queries, *args)

    monkeypatch.setattr(recommend.Recommender, "_top_k", broken)
    with pytest.raises(ValueError, match="NaN"):
        lists.write_lists(path, sasrec, np.arange(5), 3)
    assert [x.name for x in tmp_path.iterdir()] == ["lists.csv"] and path.read_text() == "of yesterday"
    with pytest.raises(ValueError, match="must end in .parquet or .csv"):
        lists.write_lists(tmp_path / "lists.txt", sasrec, np.arange(5), 3)


def test_it_starts_without_what_only_training_needs(workdirs):
    """Seconds of imports are seconds that somebody waits for a list."""
    slow_imports = "grain orbax matplotlib pyarrow tensorboardX scipy qwix tqdm rec_jax.experiment"
    code = (
        f"import sys, rec_jax; print(rec_jax.load({str(workdirs / 'sasrec')!r}).recommend(['i1', 'i2']));"
        f"print('imported:', *set({slow_imports.split()}) & set(sys.modules))"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "the 10 best next items" in done.stdout and "imported:\n" in done.stdout, done.stdout + done.stderr


def test_broken_scores_are_an_error(workdirs, tmp_path):
    model = rec_jax.load(workdirs / "sasrec").model
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), model.params)
    trained.save(tmp_path, params, 1, model.config, DATASET)
    with pytest.raises(ValueError, match="NaN among the scores"):
        rec_jax.load(tmp_path).recommend(user="u0")
