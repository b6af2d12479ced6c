import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.data.histories import Histories, examples, leave_one_out
from rec_jax.eval.evaluator import EvalConfig, evaluate, per_example, rank_examples, sample_unseen
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.nn.sharded import AXES, Placement, SpreadScores

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


def table_scorer(histories, scores_UV):
    """Scores that depend on the user alone."""
    return lambda users, ends: scores_UV[users].astype(np.float32)


def slow_ranks(histories, ex, scores_UV, filter_seen):
    out = []
    for user, end, target in zip(ex.users, ex.ends, ex.targets, strict=True):
        seen = set(histories.items[histories.offsets[user] : end]) if filter_seen else set()
        rivals = [v for v in range(1, NUM_ITEMS + 1) if v != target and v not in seen]
        above = sum(scores_UV[user, v] > scores_UV[user, target] for v in rivals)
        level = sum(scores_UV[user, v] == scores_UV[user, target] for v in rivals)
        out.append((above, 1 + level))
    return np.array(out)


@pytest.mark.parametrize("batch_bytes", [1, 4 * (NUM_ITEMS + 1) * 7, 2**20])
@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "huge", "minus_inf"])
def test_ranks_equal_a_double_loop(kind, batch_bytes):
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
    ranks = rank_examples(
        table_scorer(histories, scores_UV), histories, ex, EvalConfig(batch_bytes=batch_bytes)
    )
    filtered = np.stack([ranks.greater, ranks.equal], axis=1)
    unfiltered = np.stack([ranks.greater_unfiltered, ranks.equal_unfiltered], axis=1)
    np.testing.assert_array_equal(filtered, slow_ranks(histories, ex, scores_UV, True))
    np.testing.assert_array_equal(unfiltered, slow_ranks(histories, ex, scores_UV, False))


@pytest.mark.parametrize("score", [0, 1, -1e30, np.inf, -np.inf])
def test_constant_scores_get_exactly_chance_level(score):
    histories = random_histories()
    result = evaluate(
        table_scorer(histories, np.full((40, NUM_ITEMS + 1), score)),
        histories,
        leave_one_out(histories),
        "test",
        EvalConfig(filter_seen=False, bootstrap=0),
    )
    assert result["hr@10"] == pytest.approx(10 / NUM_ITEMS)
    assert result["hr@5"] == pytest.approx(5 / NUM_ITEMS)
    assert result["mean_rank"] == pytest.approx((NUM_ITEMS + 1) / 2)


def test_a_user_who_saw_everything_but_the_target_ranks_it_first():
    histories = make_histories([[*range(1, NUM_ITEMS), NUM_ITEMS]])
    scores_UV = np.zeros((1, NUM_ITEMS + 1))
    scores_UV[0, NUM_ITEMS] = -5  # the worst score of all
    ex = examples(histories, leave_one_out(histories), "test")
    ranks = rank_examples(table_scorer(histories, scores_UV), histories, ex, EvalConfig())
    assert (ranks.greater[0], ranks.equal[0]) == (0, 1)
    assert (ranks.greater_unfiltered[0], ranks.equal_unfiltered[0]) == (NUM_ITEMS - 1, 1)


def test_a_repeated_target_is_still_ranked():
    histories = make_histories([[1, 2, 3, 1]])
    scores_UV = -np.arange(NUM_ITEMS + 1, dtype=np.float64)[None]
    ex = examples(histories, leave_one_out(histories), "test")
    ranks = rank_examples(table_scorer(histories, scores_UV), histories, ex, EvalConfig())
    assert (ranks.greater[0], ranks.equal[0]) == (0, 1)


def test_recommended_lists_hold_no_seen_item():
    histories = random_histories()
    scores_UV = np.random.default_rng(2).normal(size=(40, NUM_ITEMS + 1))
    ex = examples(histories, leave_one_out(histories), "test")
    config = EvalConfig(ks=(3, 10))
    ranks = rank_examples(table_scorer(histories, scores_UV), histories, ex, config)
    for user, end, target, top in zip(ex.users, ex.ends, ex.targets, ranks.top_EK[:, :3], strict=True):
        seen = set(histories.items[histories.offsets[user] : end]) - {target}
        order = [v for v in np.argsort(-scores_UV[user, 1:]) + 1 if v not in seen]
        assert list(top) == order[:3]


@pytest.mark.parametrize("score", [0, -np.inf])
def test_a_list_is_shorter_when_nothing_unseen_is_left(score):
    histories = make_histories([[*range(1, NUM_ITEMS + 1)]])  # the target alone is unseen
    split = leave_one_out(histories)
    scorer = table_scorer(histories, np.full((1, NUM_ITEMS + 1), score))
    ranks = rank_examples(scorer, histories, examples(histories, split, "test"), EvalConfig())
    assert sorted(ranks.top_EK[0])[::-1] == [NUM_ITEMS] + [0] * (NUM_ITEMS - 1)
    result = evaluate(scorer, histories, split, "test", EvalConfig(bootstrap=0))
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
        evaluate(table_scorer(histories, scores_UV), histories, leave_one_out(histories), "val", EvalConfig())


def test_sampled_negatives_are_untouched_and_reproducible():
    histories = random_histories()
    users = np.arange(40)
    negatives = sample_unseen(histories, users, 3, seed=0)
    np.testing.assert_array_equal(negatives[7:8], sample_unseen(histories, users[7:8], 3, seed=0))
    for user, row in enumerate(negatives):
        touched = histories.items[histories.offsets[user] : histories.offsets[user + 1]]
        assert len(set(row)) == 3 and not set(row) & set(touched)


def test_sampled_protocol_says_what_it_is():
    histories = random_histories()
    scores_UV = np.random.default_rng(3).normal(size=(40, NUM_ITEMS + 1))
    split = leave_one_out(histories)
    result = evaluate(
        table_scorer(histories, scores_UV), histories, split, "test", EvalConfig(sampled_negatives=3)
    )
    ex = examples(histories, split, "test")
    negatives = sample_unseen(histories, ex.users, 3, seed=0)
    places = 1 + (scores_UV[ex.users[:, None], negatives] > scores_UV[ex.users, ex.targets][:, None]).sum(1)
    assert result["sampled3/mrr"] == pytest.approx((1 / places).mean())
    assert "Krichene" in result["sampled3/warning"]


def test_breakdowns_add_up():
    histories = random_histories()
    scores_UV = np.random.default_rng(4).normal(size=(40, NUM_ITEMS + 1))
    result = evaluate(
        table_scorer(histories, scores_UV), histories, leave_one_out(histories), "val", EvalConfig()
    )
    for name in ("by_history_length", "by_popularity"):
        rows = result[name].values()
        assert sum(row["num_examples"] for row in rows) == result["num_examples"] == 40
        mean = sum(row["ndcg@10"] * row["num_examples"] for row in rows) / 40
        assert mean == pytest.approx(result["ndcg@10"])
    assert result["filtered/ndcg@10"] == result["ndcg@10"] != result["unfiltered/ndcg@10"]


@pytest.mark.parametrize("filter_seen", [True, False])
def test_the_mean_over_examples_is_the_metric(filter_seen):
    histories = random_histories()
    split = leave_one_out(histories)
    scorer = table_scorer(histories, np.random.default_rng(1).normal(size=(40, NUM_ITEMS + 1)))
    config = EvalConfig(filter_seen=filter_seen, bootstrap=0, ks=(3, 10))
    whole = evaluate(scorer, histories, split, "test", config)
    values = per_example(scorer, histories, split, "test", config)
    assert len(values["ndcg@3"]) == whole["num_examples"] and 0 < whole["ndcg@3"] < 1
    for name in ("ndcg@3", "hr@10", "mrr"):
        assert values[name].mean() == pytest.approx(whole[name])


def test_a_drawn_part_is_some_of_the_examples_and_the_same_every_time():
    histories = random_histories()
    split, users_seen = leave_one_out(histories), []

    def score_fn(users, ends):
        users_seen.extend(users)
        return np.random.default_rng(2).normal(size=(40, NUM_ITEMS + 1))[users].astype(np.float32)

    config = EvalConfig(max_examples=9, bootstrap=0, batch_bytes=1)
    first = evaluate(score_fn, histories, split, "test", config, seed=3)
    drawn, users_seen = list(users_seen), []
    assert len(set(drawn)) == 9 and drawn == sorted(drawn)
    assert first["num_examples"] == 9 and first["num_held_out"] == 40
    assert evaluate(score_fn, histories, split, "test", config, seed=3) == first
    everyone = evaluate(score_fn, histories, split, "test", EvalConfig(bootstrap=0), seed=3)
    more = evaluate(score_fn, histories, split, "test", EvalConfig(bootstrap=0, max_examples=41), seed=3)
    assert more == everyone and everyone["num_examples"] == 40


@pytest.mark.parametrize("kind", ["normal", "ties", "minus_inf"])
@pytest.mark.parametrize("data, model", [(1, 1), (2, 4)])
def test_scores_that_lie_spread_over_a_mesh_rank_the_same(kind, data, model):
    histories = random_histories()
    rng = np.random.default_rng(1)
    scores_UV = {
        "normal": rng.normal(size=(40, NUM_ITEMS + 1)),
        "ties": rng.integers(0, 3, (40, NUM_ITEMS + 1)),
        "minus_inf": rng.choice([-np.inf, 0, 1], (40, NUM_ITEMS + 1)),
    }[kind]
    mesh, placement = make_mesh(MeshConfig(data=data, model=model)), Placement(NUM_ITEMS + 1)
    sharding = NamedSharding(mesh, P(None, AXES))

    def spread_fn(users, ends):
        physical = np.asarray(placement.place(scores_UV[users].astype(np.float32).T)).T
        return SpreadScores(jax.device_put(physical, sharding), placement, mesh)

    ex = examples(histories, leave_one_out(histories), "test")
    for filter_seen in (True, False):
        config = EvalConfig(
            filter_seen=filter_seen, sampled_negatives=3, batch_bytes=4 * (NUM_ITEMS + 1) * 16
        )
        whole = rank_examples(table_scorer(histories, scores_UV), histories, ex, config)
        spread = rank_examples(spread_fn, histories, ex, config)
        for name in (
            "greater",
            "equal",
            "greater_unfiltered",
            "equal_unfiltered",
            "sampled_greater",
            "sampled_equal",
        ):
            np.testing.assert_array_equal(getattr(spread, name), getattr(whole, name), err_msg=name)
        if kind == "normal":  # where no order is left to choice
            np.testing.assert_array_equal(spread.top_EK, whole.top_EK)
        np.testing.assert_array_equal(np.sort(spread.top_EK > 0), np.sort(whole.top_EK > 0))


def test_a_spread_nan_is_found():
    histories, mesh, placement = random_histories(), make_mesh(MeshConfig(data=2)), Placement(NUM_ITEMS + 1)
    scores_BV = np.zeros((40, placement.size), np.float32)
    scores_BV[:, placement.to_physical(5)] = np.nan
    spread = SpreadScores(jax.device_put(scores_BV, NamedSharding(mesh, P(None, AXES))), placement, mesh)
    with pytest.raises(ValueError, match="NaN among the scores of user u0"):
        evaluate(lambda users, ends: spread, histories, leave_one_out(histories), "val", EvalConfig())
