"""Properties that every model of the registry must have, for training, evaluation and recommendation."""

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
from rec_jax.models.base import define_model, init_model
from rec_jax.models.beam import BeamRanker
from rec_jax.models.registry import MODELS, model_builder
from rec_jax.models.scoring import SequenceRanker
from rec_jax.models.semantic_ids import SemanticIdsConfig, numbered_semantic_ids
from rec_jax.run_config import ExperimentConfig
from rec_jax.train.loop import TrainConfig
from rec_jax.train.optim import OptimConfig
from rec_jax.training import make_step

NUM_ITEMS, MAX_LEN, NUM_ROWS = 20, 12, 8
SMALL = {"width": 16, "ff_width": 12, "num_heads": 2, "dropout": 0.5}
LENGTHS = [1, 4, 12, 5, 3, 9, 2, 7]
EVERY_MODEL = pytest.mark.parametrize("config_class", MODELS, ids=lambda config: config.type)


def small(config_class, **fields):
    fields = SMALL | fields
    return config_class(**{name: x for name, x in fields.items() if hasattr(config_class, name)})


def builder(config):
    semantic_ids = numbered_semantic_ids(NUM_ITEMS, SemanticIdsConfig(codebook_size=3, num_levels=2))
    return model_builder(config, NUM_ITEMS, MAX_LEN, semantic_ids)


@functools.cache
def initial(config_class):
    model, params = init_model(builder(small(config_class)), seed=0)
    return model, jax.device_get(params)


def select_params(params, like):
    """Returns the part of the parameters that a model with fewer layers has; like: its parameters."""
    if isinstance(like, dict):
        return {name: select_params(params[name], like[name]) for name in like}
    return params


@functools.cache
def make(config_class):
    """Returns (model, params). Parameters are far from initial values, so that tests notice scales and
    gates."""
    model, params = initial(config_class)
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: jnp.float32(x + 0.3 * rng.normal(size=x.shape)), params)


@functools.cache  # tests of one model share its programs
def encoder(config_class):
    model, params = make(config_class)
    return jax.jit(
        lambda batch, key_B=None, query_positions=None: model.bind(params)(batch, key_B, query_positions)
    )


@functools.cache
def histories():
    """Returns histories with up to a month between events."""
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


def rows(users):
    """Returns a batch of the whole histories of some users. One item in five is masked, which only models
    that are not causal use."""
    h = histories()
    plan = plan_packing(np.diff(h.offsets)[users], MAX_LEN)
    slot_users = np.empty_like(plan.users_by_len)
    slot_users[plan.slots_by_len] = plan.users_by_len
    ends = h.offsets[np.asarray(users) + 1]
    columns = {"item": h.items, "time": h.times}
    batch = fill_rows(columns, plan, np.arange(plan.num_rows), slot_users, ends, NUM_ROWS, (TIME,))
    is_query = (batch.items % 5 == 0) & (batch.items > 0)
    return batch.with_targets(batch.items % NUM_ITEMS + (batch.items > 0)).replace(is_query=is_query)


@EVERY_MODEL
def test_encoding_of_a_history_does_not_depend_on_its_row(config_class):
    encode, packed = encoder(config_class), rows([1, 3, 4])  # one row of 5, 4 and 3 events
    x_SD = np.asarray(encode(packed))[0]
    for user, inside in ((3, slice(0, 5)), (1, slice(5, 9)), (4, slice(9, 12))):
        alone = np.asarray(encode(rows([user])))[0, : LENGTHS[user]]
        np.testing.assert_allclose(x_SD[inside], alone, rtol=1e-3, atol=1e-5)
    assert np.isfinite(np.asarray(encode(rows(range(len(LENGTHS)))))).all()  # padding, too


@EVERY_MODEL
def test_later_events_are_not_used(config_class):
    model, _ = make(config_class)
    if not model.is_causal:
        pytest.skip("attends in both directions; test_bert4rec.py checks that targets are masked")
    encode, batch = encoder(config_class), rows([2])
    before = np.asarray(encode(batch))
    for position in (1, 5, 11):
        is_later = np.arange(MAX_LEN) >= position
        events = {
            "item": np.where(is_later, 1 + batch.items % NUM_ITEMS, batch.items),
            "time": np.where(is_later, batch.events["time"] + 10**6, batch.events["time"]),
        }
        others = batch.replace(events=events), batch.keep(~is_later)
        changed, shorter = (np.asarray(encode(other)) for other in others)
        for x_BSD in (changed, shorter):
            np.testing.assert_allclose(x_BSD[0, :position], before[0, :position], rtol=1e-5, atol=1e-6)
        assert np.any(changed[0, position] != before[0, position])


@EVERY_MODEL
def test_query_positions_select_tokens(config_class):
    encode, batch = encoder(config_class), rows(range(len(LENGTHS)))
    query_positions = np.array([0, 1, 1, 0]), np.array([3, 0, 11, 7])
    x_QD, expected = encode(batch, None, query_positions), np.asarray(encode(batch))[query_positions]
    np.testing.assert_allclose(x_QD, expected, rtol=1e-4, atol=1e-5)


@EVERY_MODEL
def test_dropout_depends_only_on_its_key(config_class):
    encode, batch = encoder(config_class), rows(range(len(LENGTHS)))
    keys = [row_keys(jnp.uint32(seed), jnp.arange(NUM_ROWS)) for seed in (1, 1, 2)]
    first, again, other = (np.asarray(encode(batch, key_B)) for key_B in keys)
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) and np.any(first != np.asarray(encode(batch)))


@EVERY_MODEL
def test_scores_of_many_histories_equal_those_of_each(config_class):
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
        alone = ranker.scores(Queries.one(h.items[inside], h.times[inside])).whole()
        np.testing.assert_allclose(scores_BV[user], alone[0], rtol=1e-3, atol=1e-4)
    # The event after a history, which follows it in the log, is not read.
    users = np.maximum(users, 1)  # user 0 has only one event
    ends = h.offsets[users + 1] - 1
    changed = Histories(h.items.copy(), h.times, h.offsets, h.user_ids, h.item_ids)
    changed.items[h.offsets[1:] - 1] = 1
    np.testing.assert_array_equal(*(ranker.scores(Queries.of(x, users, ends)).whole() for x in (h, changed)))


@EVERY_MODEL
def test_steps_are_equal_on_every_mesh_and_fit_a_small_data_set(config_class):
    config = small(config_class, dropout=0.0, num_layers=1)  # compiles faster than two layers
    model = define_model(builder(config))
    params = select_params(initial(config_class)[1], model.abstract_params)
    batch = rows(range(1, len(LENGTHS))).replace(is_query=None)
    if not model.is_causal:
        batch = batch.with_targets(batch.items)

    def losses(data, micro_rows, steps):
        mesh = make_mesh(MeshConfig(data=data))
        experiment = ExperimentConfig(
            data=DataConfig(max_len=MAX_LEN),
            model=config,
            optim=OptimConfig(learning_rate=0.005, b2=0.999),
            train=TrainConfig(batch_rows=NUM_ROWS, micro_rows=micro_rows),
            mesh=MeshConfig(data=data),
        )
        step = make_step(experiment, model, np.ones(NUM_ITEMS + 1), mesh)
        state, placed = step.init(params), place_batch(batch, mesh)
        for _ in range(steps):
            state, metrics = step(state, placed)
            yield float(metrics["loss"][0] / metrics["loss"][1])

    one_device = list(losses(1, NUM_ROWS, 200))
    np.testing.assert_allclose(list(losses(4, 1, 3)), one_device[:3], rtol=2e-4)
    assert np.mean(one_device[-10:]) < 0.3 * one_device[0]
