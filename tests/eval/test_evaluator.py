import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.data.histories import Histories, examples, global_temporal, leave_one_out
from rec_jax.data.queries import Queries
from rec_jax.eval.evaluator import EvalConfig, check_eval, evaluate, per_example, rank_examples, sample_unseen
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.models import baselines
from rec_jax.models.ranker import ScoreRanker
from rec_jax.objectives.catalogue import Scores
from rec_jax.report import print_scores
from rec_jax.tables.exchange import AXES, Placement

NUM_ITEMS = 12


def make_histories(rows, num_items=NUM_ITEMS):
    return Histories(
        items=np.concatenate(rows).astype(np.int32),
        times=None,
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        user_ids=np.array([f"u{i}" for i in range(len(rows))]),
        item_ids=np.array(["", *(f"i{i}" for i in range(1, num_items + 1))]),
    )


def random_histories(seed=0, num_users=40):
    rng = np.random.default_rng(seed)
    return make_histories([rng.integers(1, NUM_ITEMS + 1, rng.integers(3, 9)) for _ in range(num_users)])


def table_ranker(scores_UV):
    """A ranker whose scores depend only on the user."""
    return ScoreRanker(lambda queries: scores_UV[queries.users].astype(np.float32))


class ShardedRanker(ScoreRanker):
    """Like `table_ranker`, with scores sharded over a mesh."""

    def __init__(self, scores_UV, mesh):
        self._scores_UV, self._mesh, self._placement = scores_UV, mesh, Placement(NUM_ITEMS + 1)

    def scores(self, queries):
        scores_BV = self._scores_UV[queries.users].astype(np.float32)
        physical = np.asarray(self._placement.place(scores_BV.T)).T
        sharded = jax.device_put(physical, NamedSharding(self._mesh, P(None, AXES)))
        return Scores(sharded, self._placement, self._mesh)


def slow_ranks(histories, ex, scores_UV, filter_seen):
    """Reference ranks by a double loop: (items above the target, items at its score) of each example."""
    out = []
    for user, end, target in zip(ex.users, ex.ends, ex.targets, strict=True):
        seen = set(histories.items[histories.offsets[user] : end]) if filter_seen else set()
        rivals = [v for v in range(1, NUM_ITEMS + 1) if v != target and v not in seen]
        above = sum(scores_UV[user, v] > scores_UV[user, target] for v in rivals)
        tied = sum(scores_UV[user, v] == scores_UV[user, target] for v in rivals)
        out.append((above, 1 + tied))
    return np.array(out)


@pytest.mark.parametrize("batch_bytes", [1, 4 * (NUM_ITEMS + 1) * 7, 2**20])
@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "huge", "minus_inf"])
def test_ranks_match_a_double_loop(kind, batch_bytes):
    histories = random_histories()
    rng = np.random.default_rng(1)
    scores_UV = {
        "normal": rng.normal(size=(40, NUM_ITEMS + 1)),
        "ties": rng.integers(0, 3, (40, NUM_ITEMS + 1)),
        "constant": np.zeros((40, NUM_ITEMS + 1)),
        "huge": rng.choice([-1e30, 1e30, 0], (40, NUM_ITEMS + 1)),
        "minus_inf": rng.choice([-np.inf, 0, 1], (40, NUM_ITEMS + 1)),
    }[kind].astype(np.float32)
    ex = examples(histories, leave_one_out(histories), "test")
    ranks = rank_examples(table_ranker(scores_UV), histories, ex, EvalConfig(batch_bytes=batch_bytes))
    filtered = np.stack([ranks.greater, ranks.equal], axis=1)
    unfiltered = np.stack([ranks.greater_unfiltered, ranks.equal_unfiltered], axis=1)
    np.testing.assert_array_equal(filtered, slow_ranks(histories, ex, scores_UV, True))
    np.testing.assert_array_equal(unfiltered, slow_ranks(histories, ex, scores_UV, False))


@pytest.mark.parametrize("score", [0, 1, -1e30, np.inf, -np.inf])
def test_constant_scores_get_exactly_chance_level(score):
    histories = random_histories()
    result = evaluate(
        table_ranker(np.full((40, NUM_ITEMS + 1), score)),
        histories,
        leave_one_out(histories),
        "test",
        EvalConfig(filter_seen=False, bootstrap=0),
    )
    assert result["hr@10"] == pytest.approx(10 / NUM_ITEMS)
    assert result["hr@5"] == pytest.approx(5 / NUM_ITEMS)
    assert result["mean_rank"] == pytest.approx((NUM_ITEMS + 1) / 2)


def test_a_user_who_has_seen_all_other_items_ranks_the_target_first():
    histories = make_histories([[*range(1, NUM_ITEMS), NUM_ITEMS]])
    scores_UV = np.zeros((1, NUM_ITEMS + 1))
    scores_UV[0, NUM_ITEMS] = -5  # the worst score of all
    ex = examples(histories, leave_one_out(histories), "test")
    ranks = rank_examples(table_ranker(scores_UV), histories, ex, EvalConfig())
    assert (ranks.greater[0], ranks.equal[0]) == (0, 1)
    assert (ranks.greater_unfiltered[0], ranks.equal_unfiltered[0]) == (NUM_ITEMS - 1, 1)


def test_a_target_that_is_also_in_the_history_is_ranked():
    histories = make_histories([[1, 2, 3, 1]])
    scores_UV = -np.arange(NUM_ITEMS + 1, dtype=np.float64)[None]
    ex = examples(histories, leave_one_out(histories), "test")
    ranks = rank_examples(table_ranker(scores_UV), histories, ex, EvalConfig())
    assert (ranks.greater[0], ranks.equal[0]) == (0, 1)


def test_recommended_lists_contain_no_seen_item():
    histories = random_histories()
    scores_UV = np.random.default_rng(2).normal(size=(40, NUM_ITEMS + 1))
    ex = examples(histories, leave_one_out(histories), "test")
    config = EvalConfig(ks=(3, 10))
    ranks = rank_examples(table_ranker(scores_UV), histories, ex, config)
    for user, end, target, top in zip(ex.users, ex.ends, ex.targets, ranks.top_BK[:, :3], strict=True):
        seen = set(histories.items[histories.offsets[user] : end]) - {target}
        order = [v for v in np.argsort(-scores_UV[user, 1:]) + 1 if v not in seen]
        assert list(top) == order[:3]


@pytest.mark.parametrize("score", [0, -np.inf])
def test_a_list_is_shorter_when_no_unseen_item_is_left(score):
    histories = make_histories([[*range(1, NUM_ITEMS + 1)]])  # only the target is unseen
    split = leave_one_out(histories)
    ranker = table_ranker(np.full((1, NUM_ITEMS + 1), score))
    ranks = rank_examples(ranker, histories, examples(histories, split, "test"), EvalConfig())
    assert sorted(ranks.top_BK[0])[::-1] == [NUM_ITEMS] + [0] * (NUM_ITEMS - 1)
    result = evaluate(ranker, histories, split, "test", EvalConfig(bootstrap=0))
    assert result["coverage@10"] == pytest.approx(1 / NUM_ITEMS)


@pytest.mark.parametrize("field", ["bootstrap", "sampled_negatives"])
def test_negative_counts_name_the_field(field):
    with pytest.raises(ValueError, match=f"{field}=-1"):
        EvalConfig(**{field: -1})


def test_nan_scores_name_the_user():
    histories = random_histories()
    scores_UV = np.zeros((40, NUM_ITEMS + 1))
    scores_UV[3, 5] = np.nan
    with pytest.raises(ValueError, match="u3"):
        evaluate(table_ranker(scores_UV), histories, leave_one_out(histories), "val", EvalConfig())


def test_sampled_negatives_are_unseen_and_reproducible():
    histories = random_histories()
    users = np.arange(40)
    negatives = sample_unseen(histories, users, 3, seed=0)
    np.testing.assert_array_equal(negatives[7:8], sample_unseen(histories, users[7:8], 3, seed=0))
    for user, row in enumerate(negatives):
        seen = histories.items[histories.offsets[user] : histories.offsets[user + 1]]
        assert len(set(row)) == 3 and not set(row) & set(seen)


def test_sampled_protocol_ranks_among_the_negatives_and_warns():
    histories = random_histories()
    scores_UV = np.random.default_rng(3).normal(size=(40, NUM_ITEMS + 1))
    split = leave_one_out(histories)
    result = evaluate(table_ranker(scores_UV), histories, split, "test", EvalConfig(sampled_negatives=3))
    ex = examples(histories, split, "test")
    negatives = sample_unseen(histories, ex.users, 3, seed=0)
    ranks = 1 + (scores_UV[ex.users[:, None], negatives] > scores_UV[ex.users, ex.targets][:, None]).sum(1)
    assert result["sampled3/mrr"] == pytest.approx((1 / ranks).mean())
    assert "Krichene" in result["sampled3/warning"]


def test_breakdowns_average_to_the_metric():
    histories = random_histories()
    scores_UV = np.random.default_rng(4).normal(size=(40, NUM_ITEMS + 1))
    result = evaluate(table_ranker(scores_UV), histories, leave_one_out(histories), "val", EvalConfig())
    for name in ("by_history_length", "by_popularity"):
        rows = result[name].values()
        assert sum(row["num_examples"] for row in rows) == result["num_examples"] == 40
        mean = sum(row["ndcg@10"] * row["num_examples"] for row in rows) / 40
        assert mean == pytest.approx(result["ndcg@10"])
    assert result["filtered/ndcg@10"] == result["ndcg@10"] != result["unfiltered/ndcg@10"]


@pytest.mark.parametrize("filter_seen", [True, False])
def test_per_example_values_average_to_the_metric(filter_seen):
    histories = random_histories()
    split = leave_one_out(histories)
    ranker = table_ranker(np.random.default_rng(1).normal(size=(40, NUM_ITEMS + 1)))
    config = EvalConfig(filter_seen=filter_seen, bootstrap=0, ks=(3, 10))
    whole = evaluate(ranker, histories, split, "test", config)
    values = per_example(ranker, histories, split, "test", config)
    assert len(values["ndcg@3"]) == whole["num_examples"] and 0 < whole["ndcg@3"] < 1
    for name in ("ndcg@3", "hr@10", "mrr"):
        assert values[name].mean() == pytest.approx(whole[name])


def test_max_examples_draws_a_reproducible_sample():
    histories = random_histories()
    split, users_seen = leave_one_out(histories), []

    def score_fn(queries):
        users_seen.extend(queries.users)
        return np.random.default_rng(2).normal(size=(40, NUM_ITEMS + 1))[queries.users].astype(np.float32)

    ranker = ScoreRanker(score_fn)
    config = EvalConfig(max_examples=9, bootstrap=0, batch_bytes=1)
    first = evaluate(ranker, histories, split, "test", config, seed=3)
    drawn, users_seen = list(users_seen), []
    assert len(set(drawn)) == 9 and drawn == sorted(drawn)
    assert first["num_examples"] == 9 and first["num_held_out"] == 40
    assert evaluate(ranker, histories, split, "test", config, seed=3) == first
    whole = evaluate(ranker, histories, split, "test", EvalConfig(bootstrap=0), seed=3)
    too_many = evaluate(ranker, histories, split, "test", EvalConfig(bootstrap=0, max_examples=41), seed=3)
    assert too_many == whole and whole["num_examples"] == 40


@pytest.mark.parametrize("kind", ["normal", "ties", "minus_inf"])
@pytest.mark.parametrize("data, model", [(1, 1), (2, 4)])
def test_sharded_scores_give_the_same_ranks(kind, data, model):
    histories = random_histories()
    rng = np.random.default_rng(1)
    scores_UV = {
        "normal": rng.normal(size=(40, NUM_ITEMS + 1)),
        "ties": rng.integers(0, 3, (40, NUM_ITEMS + 1)),
        "minus_inf": rng.choice([-np.inf, 0, 1], (40, NUM_ITEMS + 1)),
    }[kind]
    mesh = make_mesh(MeshConfig(data=data, model=model))
    ex = examples(histories, leave_one_out(histories), "test")
    for filter_seen in (True, False):
        config = EvalConfig(
            filter_seen=filter_seen, sampled_negatives=3, batch_bytes=4 * (NUM_ITEMS + 1) * 16
        )
        whole = rank_examples(table_ranker(scores_UV), histories, ex, config)
        sharded = rank_examples(ShardedRanker(scores_UV, mesh), histories, ex, config)
        for name in (
            "greater",
            "equal",
            "greater_unfiltered",
            "equal_unfiltered",
            "sampled_greater",
            "sampled_equal",
        ):
            np.testing.assert_array_equal(getattr(sharded, name), getattr(whole, name), err_msg=name)
        if kind == "normal":  # the other kinds have ties, whose order is not defined
            np.testing.assert_array_equal(sharded.top_BK, whole.top_BK)
        np.testing.assert_array_equal(np.sort(sharded.top_BK > 0), np.sort(whole.top_BK > 0))


def test_nan_in_a_shard_is_detected():
    histories, mesh = random_histories(), make_mesh(MeshConfig(data=2))
    scores_UV = np.zeros((40, NUM_ITEMS + 1))
    scores_UV[:, 5] = np.nan
    with pytest.raises(ValueError, match="NaN among the scores of user u0"):
        evaluate(ShardedRanker(scores_UV, mesh), histories, leave_one_out(histories), "val", EvalConfig())


def test_untrained_items_are_counted_and_their_share_of_the_lists_is_printed(capsys):
    """Items 1 to 4 have training events, 5 and 6 only held-out events, 7 to 12 no events."""
    histories = make_histories([[1, 2, 5, 6], [3, 4, 5, 6]])
    split = leave_one_out(histories)
    by_id = table_ranker(-np.arange(NUM_ITEMS + 1, dtype=np.float64)[None].repeat(2, 0))  # low ids first
    result = evaluate(by_id, histories, split, "test", EvalConfig(bootstrap=0))
    # A test list leaves out the user's three seen items. Two of the nine others are trained: 3, 4 or 1, 2.
    assert result["untrained_items"] == 8
    assert result["untrained@10"] == pytest.approx(14 / 18)
    unfiltered = evaluate(by_id, histories, split, "test", EvalConfig(bootstrap=0, filter_seen=False))
    assert unfiltered["untrained@10"] == pytest.approx(6 / 10)
    print_scores({"model": result, "other": unfiltered}, part="test")
    expected = "their share of all top-10 recommendations: model 77.8%, other 60.0%"
    assert f"8 items have no training event; {expected}" in capsys.readouterr().out
    trained = split.train_item_counts(histories) > 0
    queries = Queries.of(histories, [0, 1])
    assert np.asarray(by_id.top_k(queries, 3, queries.seen(), trained)[1]).tolist() == [[3, 4, 0], [1, 2, 0]]
    known = make_histories([[*range(1, NUM_ITEMS + 1), 1, 2]])
    result = evaluate(by_id, known, leave_one_out(known), "test", EvalConfig(bootstrap=0))
    assert result["untrained_items"] == result["untrained@10"] == 0
    print_scores({"model": result}, part="test")
    assert "no training event" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sampled_negatives": 8}, "sampled_negatives=8 but user u0 has only 7 unseen items"),
        ({"baselines": ("popularity", "ease")}, "max_items=11 but there are 12 items"),
    ],
)
def test_check_eval_refuses_settings_that_an_evaluation_would_refuse(fields, message, monkeypatch):
    monkeypatch.setattr(baselines, "_EASE_ITEMS", 11)
    histories = make_histories([[1, 2, 3, 4, 5, 5], [1, 2, 3]])
    config, split = EvalConfig(bootstrap=0, **fields), leave_one_out(histories)
    with pytest.raises(ValueError, match=message):
        check_eval(config, histories, split)
    if config.sampled_negatives:
        with pytest.raises(ValueError, match=message):
            evaluate(table_ranker(np.zeros((2, NUM_ITEMS + 1))), histories, split, "test", config)
        check_eval(EvalConfig(sampled_negatives=7), histories, split)
        # If a sample is drawn, only its users count.
        drawn = EvalConfig(sampled_negatives=8, max_examples=1)
        seeds = [seed for seed in range(20) if _is_refused(drawn, histories, split, seed)]
        assert 0 < len(seeds) < 20


def _is_refused(config, histories, split, seed):
    try:
        check_eval(config, histories, split, seed)
    except ValueError:
        return True
    return False


def test_check_eval_refuses_an_empty_part():
    histories = dataclasses.replace(make_histories([[1, 2], [3, 4], [5]]), times=np.array([0, 5, 0, 5, 3]))
    split = global_temporal(histories, 3, 5)  # the only validation event has no event before it
    with pytest.raises(ValueError, match="the val part of the split has no example"):
        check_eval(EvalConfig(), histories, split)


@pytest.mark.parametrize("make", [baselines.popularity, baselines.bigram, baselines.item_knn, baselines.ease])
def test_memory_is_bounded_for_one_long_history(make):
    """3,000 examples with histories of 27,000 to 30,000 events, which would take 340 MB as int32."""
    items = np.random.default_rng(0).integers(1, 51, 30_000).astype(np.int32)
    histories = dataclasses.replace(make_histories([items], 50), times=np.arange(30_000))
    split = global_temporal(histories, 26_999, 27_000)
    ranker = make(histories, split)
    config = EvalConfig(bootstrap=0, batch_bytes=2**20)
    evaluate(ranker, histories, split, "val", config)  # compiles and imports, outside the measurement
    tracemalloc.start()
    result = evaluate(ranker, histories, split, "test", config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result["num_examples"] == 3000
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"
