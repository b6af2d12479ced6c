"""What every model of the registry promises: to its loop, its evaluator and its users."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.data.datasets import DataConfig
from rec_jax.data.histories import Histories
from rec_jax.data.packing import fill_rows, plan_packing
from rec_jax.data.queries import Queries
from rec_jax.data.schema import TIME
from rec_jax.hashing import row_keys
from rec_jax.mesh import MeshConfig, make_mesh, place_batch
from rec_jax.models.base import init_model
from rec_jax.models.beam import BeamRanker
from rec_jax.models.registry import MODELS, model_builder
from rec_jax.models.scoring import SequenceRanker
from rec_jax.models.semantic_ids import SemanticIdsConfig, numbered_semantic_ids
from rec_jax.run_config import ExperimentConfig
from rec_jax.train.loop import TrainConfig
from rec_jax.train.optim import OptimConfig
from rec_jax.training import make_step

NUM_ITEMS, MAX_LEN = 20, 12
SMALL = {"width": 8, "ff_width": 12, "num_heads": 2, "dropout": 0.5}
LENGTHS = [1, 4, 12, 5, 3, 9, 2, 7]
EVERY_MODEL = pytest.mark.parametrize("config_class", MODELS, ids=lambda config: config.type)


def small(config_class, **fields):
    fields = SMALL | fields
    return config_class(**{name: x for name, x in fields.items() if hasattr(config_class, name)})


def builder(config):
    return model_builder(
        config, NUM_ITEMS, MAX_LEN, numbered_semantic_ids(NUM_ITEMS, SemanticIdsConfig(codebook_size=3))
    )


@functools.cache  # tests of one model share its compilation
def make(config_class):
    config = small(config_class)
    model, params = init_model(builder(config), seed=0)
    # Far from their start, so that scales, biases and gates take part.
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), params)
    return model, params


@functools.cache
def encoder(config_class):
    model, params = make(config_class)
    return jax.jit(
        lambda batch, key_B=None, query_positions=None: model.bind(params)(batch, key_B, query_positions)
    )


@functools.cache
def histories():
    """With times up to a month apart."""
    rng = np.random.default_rng(2)
    offsets = np.cumsum([0, *LENGTHS])
    times = np.concatenate([np.cumsum(rng.integers(0, 10 ** rng.integers(1, 7), n)) for n in LENGTHS])
    return Histories(
        items=rng.integers(1, NUM_ITEMS + 1, offsets[-1]).astype(np.int32),
        times=times.astype(np.int64),
        offsets=offsets,
        user_ids=np.arange(len(LENGTHS)).astype(str),
        item_ids=np.arange(NUM_ITEMS + 1).astype(str),
    )


def rows(users, num_rows=None):
    """These users' whole histories, packed, with an item in five masked for the models that read that."""
    h = histories()
    lengths = np.diff(h.offsets)[users]
    plan = plan_packing(lengths, MAX_LEN)
    slot_users = np.empty_like(plan.users_by_len)
    slot_users[plan.slots_by_len] = plan.users_by_len
    num_rows = plan.num_rows if num_rows is None else num_rows
    ends = h.offsets[np.asarray(users) + 1]
    columns = {"item": h.items, "time": h.times}
    batch = fill_rows(columns, plan, np.arange(plan.num_rows), slot_users, ends, num_rows, (TIME,))
    is_query = (batch.items % 5 == 0) & (batch.items > 0)
    return batch.with_targets(batch.items % NUM_ITEMS + (batch.items > 0)).replace(is_query=is_query)


@EVERY_MODEL
def test_a_history_is_encoded_the_same_in_any_company(config_class):
    encode, packed = encoder(config_class), rows([1, 3, 4])  # one row of 5, 4 and 3 events
    x_SD = np.asarray(encode(packed))[0]
    for user, inside in ((3, slice(0, 5)), (1, slice(5, 9)), (4, slice(9, 12))):
        alone = np.asarray(encode(rows([user])))[0, : LENGTHS[user]]
        np.testing.assert_allclose(x_SD[inside], alone, rtol=1e-3, atol=1e-5)
    assert np.isfinite(np.asarray(encode(rows(range(len(LENGTHS)))))).all()  # padding, too


@EVERY_MODEL
def test_nothing_that_comes_later_is_seen(config_class):
    model, _ = make(config_class)
    if not model.is_causal:
        pytest.skip("sees both sides; what it is asked for is masked (test_bert4rec.py)")
    encode, batch = encoder(config_class), rows([2])
    before = np.asarray(encode(batch))
    for query_positions in (1, 5, 11):
        later = np.arange(MAX_LEN) >= query_positions
        events = {
            "item": np.where(later, 1 + batch.items % NUM_ITEMS, batch.items),
            "time": np.where(later, batch.events["time"] + 10**6, batch.events["time"]),
        }
        changed, shorter = batch.replace(events=events), batch.keep(~later)
        for other in (changed, shorter):
            np.testing.assert_allclose(
                np.asarray(encode(other))[0, :query_positions],
                before[0, :query_positions],
                rtol=1e-5,
                atol=1e-6,
            )
        assert np.any(np.asarray(encode(changed))[0, query_positions] != before[0, query_positions])


@EVERY_MODEL
def test_asked_tokens_are_those_of_the_whole(config_class):
    encode, batch = encoder(config_class), rows(range(len(LENGTHS)))
    query_positions = np.array([0, 1, 1, 0]), np.array([3, 0, 11, 7])
    np.testing.assert_allclose(
        encode(batch, None, query_positions), encode(batch)[query_positions], rtol=1e-4, atol=1e-5
    )


@EVERY_MODEL
def test_dropout_follows_from_its_key(config_class):
    encode, batch = encoder(config_class), rows(range(len(LENGTHS)))
    keys = [row_keys(jnp.uint32(seed), jnp.arange(len(batch.items))) for seed in (1, 1, 2)]
    first, again, other = (np.asarray(encode(batch, key_B)) for key_B in keys)
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) and np.any(first != np.asarray(encode(batch)))


@EVERY_MODEL
def test_scores_of_many_are_those_of_one(config_class):
    model, params = make(config_class)
    h = histories()
    users = np.arange(len(LENGTHS))
    mesh = make_mesh(MeshConfig(data=2))
    if model.is_generative:
        ranker = BeamRanker(model, params, NUM_ITEMS, MAX_LEN, mesh, num_beams=5)
    else:
        ranker = SequenceRanker(model, params, MAX_LEN, mesh)
    scores_BV = np.asarray(ranker.scores(Queries.of(h, users)).whole())
    for user in users:
        inside = slice(*h.offsets[user : user + 2])
        one = ranker.scores(Queries.one(h.items[inside], h.times[inside])).whole()
        np.testing.assert_allclose(scores_BV[user], one[0], rtol=1e-3, atol=1e-4)
    # The event after a history, which follows it in the file, is not read.
    earlier = Queries.of(h, users[1:], h.offsets[2:] - 1)
    hidden = Histories(h.items.copy(), h.times, h.offsets, h.user_ids, h.item_ids)
    hidden.items[h.offsets[1:] - 1] = 1
    without = Queries.of(hidden, users[1:], h.offsets[2:] - 1)
    np.testing.assert_array_equal(*(ranker.scores(queries).whole() for queries in (without, earlier)))


@EVERY_MODEL
def test_a_step_is_the_same_on_every_mesh_and_a_tiny_set_is_learnt(config_class):
    config = small(config_class, width=16, dropout=0.0)
    model, params = init_model(builder(config), seed=0)
    params = jax.device_get(params)  # states are donated
    batch = rows(range(1, len(LENGTHS)), num_rows=8)
    batch = batch.replace(is_query=None)
    if not model.is_causal:
        batch = batch.with_targets(batch.items)

    def losses(data, micro_rows, steps):
        mesh, optim = make_mesh(MeshConfig(data=data)), OptimConfig(learning_rate=0.005, b2=0.999)
        train = TrainConfig(batch_rows=8, micro_rows=micro_rows)
        experiment = ExperimentConfig(
            data=DataConfig(max_len=MAX_LEN),
            model=config,
            optim=optim,
            train=train,
            mesh=MeshConfig(data=data),
        )
        step = make_step(experiment, model, np.ones(NUM_ITEMS + 1), mesh)
        state, placed = step.init(params), place_batch(batch, mesh)
        for _ in range(steps):
            state, metrics = step(state, placed)
            yield float(metrics["loss"][0] / metrics["loss"][1])

    whole = list(losses(1, 8, 200))
    np.testing.assert_allclose(list(losses(4, 1, 3)), whole[:3], rtol=2e-4)
    assert np.mean(whole[-10:]) < 0.3 * whole[0]
