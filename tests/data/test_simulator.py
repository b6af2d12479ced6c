import itertools

import numpy as np
import pytest

from rec_jax.data.histories import build_histories, examples, leave_one_out
from rec_jax.data.queries import Queries
from rec_jax.data.simulator import SimulatorConfig, World
from rec_jax.eval.evaluator import EvalConfig, evaluate
from rec_jax.models.baselines import bigram, popularity
from rec_jax.models.ranker import ScoreRanker

TINY = SimulatorConfig(num_items=6, num_users=50, num_interests=3, mean_len=8, min_len=3)


def brute_force(world, history):
    """P(next item | history): the sum over all paths of hidden interests."""
    num_z = world.config.num_interests
    emission_ZV = world.emission(np.arange(world.config.num_items + 1)).T
    np.testing.assert_allclose(emission_ZV.sum(axis=1), 1)
    joint_V = np.zeros(world.config.num_items + 1)
    for path in itertools.product(range(num_z), repeat=len(history) + 1):
        prob = world.start_Z[path[0]]
        for current, following, item in zip(path[:-1], path[1:], history, strict=True):
            prob *= emission_ZV[current, item] * world.transition_ZZ[current, following]
        joint_V += prob * emission_ZV[path[-1]]
    return joint_V / joint_V.sum()


def test_filter_equals_the_sum_over_all_hidden_paths():
    world = World(TINY)
    histories = [[1], [2, 5], [3, 3, 1, 6], [4, 2, 2, 1, 5], [4, 2, 2], [2, 5]]
    # The last two are prefixes of others and share their events.
    starts, ends = np.array([0, 1, 3, 7, 7, 1]), np.array([1, 3, 7, 12, 10, 3])
    items = np.concatenate(histories[:4]).astype(np.int32)
    probs = world.next_item_probs(Queries({"item": items}, starts, ends))
    for row, history in zip(probs, histories, strict=True):
        np.testing.assert_allclose(row, brute_force(world, history), atol=1e-12)
    assert np.all(probs[:, 0] == 0)


def test_a_sample_depends_on_the_seed_and_has_valid_items():
    log, again = World(TINY).sample(), World(TINY).sample()
    np.testing.assert_array_equal(log.items, again.items)
    other = World(SimulatorConfig(**{**vars(TINY), "seed": 1})).sample()
    assert len(other.items) != len(log.items) or np.any(other.items != log.items)
    assert log.items.min() >= 1 and log.items.max() <= 6
    histories = build_histories(log)
    assert np.all(np.diff(histories.offsets) > TINY.min_len)


def test_pairs_of_events_have_the_frequencies_of_the_chain():
    world = World(SimulatorConfig(num_items=6, num_users=4000, num_interests=3, mean_len=8, min_len=3))
    histories = build_histories(world.sample())
    first, second = (histories.items[histories.offsets[:-1] + i] for i in (0, 1))
    seen_VV = np.zeros((7, 7))
    np.add.at(seen_VV, (first, second), 1 / len(first))
    emission_ZV = world.emission(np.arange(7)).T
    expected_VV = (world.start_Z[:, None] * emission_ZV).T @ world.transition_ZZ @ emission_ZV
    np.testing.assert_allclose(seen_VV, expected_VV, atol=4 * np.sqrt(0.25 / 4000) / 2)


def test_oracle_beats_bigram_beats_popularity():
    config = SimulatorConfig(num_items=100, num_users=1500, num_interests=8, mean_len=20)
    world = World(config)
    histories = build_histories(world.sample())
    split = leave_one_out(histories)
    rankers = {"popularity": popularity(histories, split), "bigram": bigram(histories, split)}
    rankers["oracle"] = ScoreRanker(world.oracle(histories))
    config = EvalConfig(filter_seen=False, bootstrap=0)
    ndcg = {n: evaluate(s, histories, split, "test", config)["ndcg@10"] for n, s in rankers.items()}
    assert ndcg["oracle"] > 1.1 * ndcg["bigram"] > 1.2 * ndcg["popularity"]


def test_the_oracle_handles_renumbered_items():
    """A cleaned log may number items differently; the item ids contain the numbers of the world."""
    world = World(TINY)
    histories = build_histories(world.sample())
    order = np.array([0, 3, 1, 2, 6, 5, 4])  # new number of each old one
    names = np.empty(7, object)
    names[order] = histories.item_ids
    renumbered = type(histories)(
        order[histories.items], histories.times, histories.offsets, histories.user_ids, names
    )
    ex = examples(histories, leave_one_out(histories), "test")
    scores, others = (world.oracle(x)(Queries.of(x, ex.users, ex.ends)) for x in (histories, renumbered))
    np.testing.assert_allclose(others[:, order], scores)


def test_impossible_worlds_are_refused():
    with pytest.raises(ValueError, match="num_items=3"):
        SimulatorConfig(num_items=3, num_interests=2)
    with pytest.raises(ValueError, match="stay=1"):
        SimulatorConfig(stay=1.0)
    with pytest.raises(ValueError, match="mean_len=4"):
        SimulatorConfig(mean_len=4, min_len=5)
