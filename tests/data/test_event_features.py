"""Two columns of a CSV, a text and a number, followed from the file into a model that reads them.

All that knows of them is their schema (`data.features`, `data.context`) and the models below.
"""

import dataclasses
import functools
from typing import Literal

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.data.datasets import DataConfig, load_dataset
from rec_jax.data.pipeline import BatchSource, EpochPlan
from rec_jax.data.queries import Queries
from rec_jax.data.schema import Feature
from rec_jax.eval.evaluator import EvalConfig
from rec_jax.experiment import Experiment, ExperimentConfig
from rec_jax.hashing import row_keys
from rec_jax.mesh import MeshConfig, make_mesh, place_batch
from rec_jax.models.base import init_model
from rec_jax.models.bert4rec import BERT4Rec, BERT4RecConfig
from rec_jax.models.registry import MODELS, model_builder
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.models.scoring import SequenceRanker
from rec_jax.nn.dims import named
from rec_jax.objectives.augment import AugmentConfig, augment
from rec_jax.objectives.contrastive import ContrastiveConfig
from rec_jax.objectives.token_loss import SampledSoftmaxConfig
from rec_jax.tables.config import TableConfig
from rec_jax.tables.embedding import Embedding
from rec_jax.train.loop import TrainConfig
from rec_jax.train.optim import OptimConfig
from rec_jax.training import make_step

MAX_LEN = 8
SMALL = {"width": 8, "ff_width": 8, "num_heads": 1, "num_layers": 1, "dropout": 0.0}


DEVICE = Feature("device", "id", values=("", "a", "b", "c"))


class ReadsDevice:
    """Adds the vector of an event's device, and how long it was watched along another."""

    columns = ("device", "dwell")

    def __init__(self, config, num_items, max_len, *, schema=(DEVICE,), rngs):
        super().__init__(config, num_items, max_len, rngs=rngs)
        (device,) = [feature for feature in schema if feature.name == "device"]
        self.devices = named(Embedding(device.num_ids + 1, config.width, rngs=rngs), "devices", "width")
        dwell = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (config.width,)))
        self.dwell = named(dwell, "width")

    def look_up(self, batch):
        dwell_BSD = batch.events["dwell"][..., None] * self.dwell[...]
        return super().look_up(batch) + self.devices(batch.events["device"]) + dwell_BSD


class DeviceSASRec(ReadsDevice, SASRec):
    pass


class DeviceBERT4Rec(ReadsDevice, BERT4Rec):
    pass


def load(tmp_path, text, context):
    (tmp_path / "log.csv").write_text(text)
    config = DataConfig(
        path=str(tmp_path / "log.csv"), features=("device", "dwell"), context=context, max_len=MAX_LEN
    )
    return load_dataset(config, tmp_path / "data")


def source_of(dataset, model=DeviceSASRec, batch_rows=1):
    return BatchSource(
        dataset.histories,
        dataset.split,
        EpochPlan(MAX_LEN, batch_rows),
        is_causal=model.is_causal,
        schema=tuple(feature for feature in dataset.schema if feature.name in model.columns),
    )


# Ann watches six events and Bob five; of each the last two are held out. Lines are not in the order of time.
LOG = """user,item,time,device,dwell
ann,i1,100,tv,2
bob,j1,500,phone,6
ann,i2,110,phone,4
ann,i3,130,,
bob,j2,505,tv,2
ann,i4,160,tv,6
ann,i6,190,watch,1e9
bob,j3,525,phone,4
ann,i5,180,phone,-1e9
bob,j4,530,watch,-1e9
bob,j5,540,tv,1e9
"""
# Training numbers are 2, 4, 6, 6, 2, 4, one missing: a mean of 4 and a variance of 16 / 6.
UNIT = 2 / np.sqrt(16 / 6)
PHONE, TV = 1, 2  # in the order of the alphabet; 3 is the watch of held-out events


@pytest.fixture
def small(tmp_path):
    return load(tmp_path, LOG, context=("device",))


def test_a_packed_row_by_hand(small):
    device, dwell = small.schema[1:]
    assert (device.name, device.kind, device.is_outcome) == ("device", "id", False)
    assert device.values == ("", "phone", "tv", "watch")
    assert (dwell.name, dwell.kind, dwell.is_outcome) == ("dwell", "number", True)
    assert (dwell.mean, dwell.std) == (4, pytest.approx(np.sqrt(16 / 6)))

    ids = {item: code for code, item in enumerate(small.histories.item_ids)}
    batch = source_of(small)[0]
    assert batch.events.keys() == {"item", "device", "dwell"}  # no time, which this model does not read
    assert batch.next.keys() == {"item", "device"}  # of the next event: its context alone
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 0, 0, 0]])
    items = [[ids[x] for x in ("i1", "i2", "i3", "j1", "j2", "", "", "")]]
    np.testing.assert_array_equal(batch.items, items)
    targets = [[ids[x] for x in ("i2", "i3", "i4", "j2", "j3", "", "", "")]]
    np.testing.assert_array_equal(batch.targets, targets)
    np.testing.assert_array_equal(batch.events["device"], [[TV, PHONE, 0, PHONE, TV, 0, 0, 0]])
    np.testing.assert_array_equal(batch.next["device"], [[PHONE, 0, TV, TV, PHONE, 0, 0, 0]])
    expected = [[-UNIT, 0, 0, UNIT, -UNIT, 0, 0, 0]]  # one is the mean, one is missing
    np.testing.assert_allclose(batch.events["dwell"], expected, rtol=1e-6)
    assert batch.events["dwell"].dtype == np.float32 and batch.events["device"].dtype == np.int32


def test_a_row_of_a_model_of_masked_items_by_hand(small):
    batch = source_of(small, DeviceBERT4Rec)[0]
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 2, 2, 2, 0]])
    np.testing.assert_array_equal(batch.events["device"], [[TV, PHONE, 0, TV, PHONE, TV, PHONE, 0]])
    for name in ("item", "device"):  # the event to predict at a token is its own
        np.testing.assert_array_equal(batch.next[name], batch.events[name])

    config = BERT4RecConfig(**SMALL)
    model, params = init_model(lambda rngs: DeviceBERT4Rec(config, 11, MAX_LEN, rngs=rngs), seed=0)
    masked = model.bind(params).training_batch(batch, row_keys(jnp.uint32(1), jnp.arange(1)))
    is_query = np.asarray(masked.is_query)
    assert 0 < is_query.sum() < 7
    np.testing.assert_array_equal(masked.items, np.where(is_query, 0, batch.items))
    np.testing.assert_array_equal(masked.targets, np.where(is_query, batch.items, 0))
    np.testing.assert_array_equal(masked.events["dwell"], np.where(is_query, 0, batch.events["dwell"]))
    np.testing.assert_array_equal(masked.events["device"], batch.events["device"])
    np.testing.assert_array_equal(masked.next["device"], batch.next["device"])


def test_the_model_adds_what_it_reads(small):
    """Without layers, what is encoded is the normalised sum of the vectors and the position."""
    config = SASRecConfig(**SMALL | {"num_layers": 0})
    model, params = init_model(lambda rngs: DeviceSASRec(config, 11, MAX_LEN, rngs=rngs), seed=0)
    assert model.columns == ("device", "dwell")
    batch = source_of(small)[0]
    x_SD = np.asarray(model.bind(params)(batch))[0]
    tables = [np.asarray(params[name]["embedding"], np.float64) for name in ("items", "devices", "positions")]
    for column, (device, dwell) in enumerate([(TV, -UNIT), (PHONE, 0), (0, 0), (PHONE, UNIT), (TV, -UNIT)]):
        x = tables[0][batch.items[0, column]] + tables[1][device] + dwell * np.asarray(params["dwell"])
        x = x * np.sqrt(8) + tables[2][batch.positions[0, column]]
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
        np.testing.assert_allclose(x_SD[column], x, rtol=1e-4, atol=1e-5)


def test_one_more_event_is_encoded_as_in_the_whole_history(small):
    config = SASRecConfig(**SMALL)
    model, params = init_model(lambda rngs: DeviceSASRec(config, 11, MAX_LEN, rngs=rngs), seed=0)
    batch, module = source_of(small)[0], model.bind(params)
    expected = np.asarray(module(batch))[0]
    first, cache = module.prefill(batch, (np.array([0]), np.array([1])), room=1)
    np.testing.assert_allclose(first[0], expected[1], rtol=1e-5, atol=1e-5)
    second, _ = module.step({name: column[:, 2:3] for name, column in batch.events.items()}, cache)
    np.testing.assert_allclose(second[0, 0], expected[2], rtol=1e-5, atol=1e-5)


def ranker(dataset, model_class, config):
    num_items = dataset.histories.num_items
    model, params = init_model(lambda rngs: model_class(config, num_items, MAX_LEN, rngs=rngs), seed=0)
    schema = tuple(feature for feature in dataset.schema if feature.name in model.columns)
    return SequenceRanker(model, params, MAX_LEN, make_mesh(MeshConfig(data=1)), schema=schema), model, params


def test_a_trained_model_ranks_by_what_it_reads(small):
    rank, model, params = ranker(small, DeviceSASRec, SASRecConfig(**SMALL))
    h, batch = small.histories, source_of(small)[0]
    x_SD = np.asarray(model.bind(params)(batch))[0]
    expected = x_SD[[2, 4]] @ np.asarray(params["items"]["embedding"]).T  # after the last input of each
    queries = Queries.of(h, [0, 1], h.offsets[:2] + [3, 2])
    np.testing.assert_allclose(rank.scores(queries).whole()[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model_class, config", [(DeviceSASRec, SASRecConfig(**SMALL)), (DeviceBERT4Rec, BERT4RecConfig(**SMALL))]
)
def test_what_the_log_has_after_a_history_is_not_read(small, model_class, config):
    """Be it held out, or the first event of the next user."""
    rank, _, _ = ranker(small, model_class, config)
    h = small.histories
    users, ends = [0, 0, 1], np.array([3, h.offsets[1], h.offsets[1] + 2])
    scores = np.asarray(rank.scores(Queries.of(h, users, ends)).whole())
    for row, (user, end) in enumerate(zip(users, ends, strict=True)):
        own = {name: np.asarray(column)[h.offsets[user] : end] for name, column in h.columns.items()}
        alone = Queries(own, np.array([0]), np.array([end - h.offsets[user]]))
        np.testing.assert_allclose(rank.scores(alone).whole()[0, 1:], scores[row, 1:], rtol=1e-5, atol=1e-6)


# A larger log in which item k is always seen on one device and for a time of its own, so that any event shows
# whether its columns are still together.
NUM_ITEMS, NUM_USERS = 30, 60


def device_of(item):
    return 1 + item % 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    rng = np.random.default_rng(0)
    lines = ["user,item,time,device,dwell"]
    lines += [f"first,{item},{item},{('phone', 'tv')[item % 2]},{item}" for item in range(1, NUM_ITEMS + 1)]
    for user in range(NUM_USERS):
        for time in range(rng.integers(4, 9)):
            item = rng.integers(1, NUM_ITEMS + 1)
            lines.append(f"u{user},{item},{time},{('phone', 'tv')[item % 2]},{item}")
    dataset = load(tmp_path_factory.mktemp("large"), "\n".join(lines), context=("device",))
    assert dataset.histories.item_ids.tolist() == ["", *map(str, range(1, NUM_ITEMS + 1))]
    return dataset


@pytest.fixture(scope="module")
def packed(large):
    """(a batch of several segments a row, the dwell of each item as a model reads it)."""
    batch = source_of(large, batch_rows=16)[0]
    assert batch.segments.max() > 1 and (batch.segments == 0).any()
    dwell = large.schema[-1].encode(np.arange(NUM_ITEMS + 1.0))
    dwell[0] = 0
    return batch, dwell


NEIGHBOURS = jnp.asarray([[0]] + [[k % NUM_ITEMS + 1] for k in range(1, NUM_ITEMS + 1)])


def changed(batch, **fields):
    keys = row_keys(jnp.uint32(3), jnp.arange(len(batch.items)))
    view = jax.jit(functools.partial(augment, AugmentConfig(**fields)))(batch, keys, NEIGHBOURS)
    return jax.device_get(view)


def assert_together(batch, dwell_V, where):
    """Both columns are those of the item, wherever there is one to be seen; the context of the next event is
    that of the target, wherever there is one."""
    items, targets = batch.items[where], batch.targets
    assert (items > 0).all() and len(items)
    np.testing.assert_array_equal(batch.events["device"][where], device_of(items))
    np.testing.assert_allclose(batch.events["dwell"][where], dwell_V[items], rtol=1e-6)
    assert batch.next.keys() == {"item", "device"} and (targets > 0).any()
    np.testing.assert_array_equal(batch.next["device"][targets > 0], device_of(targets[targets > 0]))


def test_packing_keeps_columns_together(packed):
    batch, dwell_V = packed
    assert_together(batch, dwell_V, batch.segments > 0)
    is_padding = batch.segments == 0
    for column in (*batch.events.values(), *batch.next.values()):
        assert not column[is_padding].any()


def test_a_crop_keeps_columns_together_and_empties_the_rest(packed):
    batch, dwell_V = packed
    view = changed(batch, crop=0.5)
    is_kept = view.segments > 0
    assert 0.3 < is_kept.sum() / (batch.segments > 0).sum() < 0.7
    assert_together(view, dwell_V, is_kept)
    for part in ("events", "next"):
        for name, column in getattr(view, part).items():
            np.testing.assert_array_equal(column, np.where(is_kept, getattr(batch, part)[name], 0))


def test_a_mask_hides_outcomes_and_no_context(packed):
    batch, dwell_V = packed
    view = changed(batch, mask=0.4)
    is_hidden = (view.items == 0) & (batch.segments > 0)
    assert 0.3 < is_hidden.sum() / (batch.segments > 0).sum() < 0.5
    assert_together(view, dwell_V, view.items > 0)
    assert not view.events["dwell"][is_hidden].any()  # the mean, as of any event that is not known
    assert batch.events["dwell"][is_hidden].all()
    np.testing.assert_array_equal(view.events["device"], batch.events["device"])
    for name in ("item", "device"):
        np.testing.assert_array_equal(view.next[name], batch.next[name])


def test_reordered_events_move_with_their_columns(packed):
    batch, dwell_V = packed
    view = changed(batch, reorder=0.8)
    assert (view.items != batch.items).sum() > 20
    assert_together(view, dwell_V, batch.segments > 0)
    assert (view.events["device"] != batch.events["device"]).any()
    np.testing.assert_array_equal(view.next["device"], batch.next["device"])  # when it is requested stays


def test_a_substitute_takes_the_place_of_an_item_alone(packed):
    batch, dwell_V = packed
    view = changed(batch, substitute=0.4)
    is_other = view.items != batch.items
    assert 0.3 < is_other.sum() / (batch.segments > 0).sum() < 0.5
    np.testing.assert_array_equal(view.items[is_other], batch.items[is_other] % NUM_ITEMS + 1)
    for name in ("device", "dwell"):  # they are of the event, not of the item
        np.testing.assert_array_equal(view.events[name], batch.events[name])
    assert_together(view, dwell_V, (view.segments > 0) & ~is_other)


def test_all_changes_at_once_mix_no_histories(packed):
    """Each segment has one: columns are hidden, or those of the item, or of the one it replaced."""
    batch, dwell_V = packed
    view = changed(batch, crop=0.5, mask=0.4, reorder=0.8, substitute=0.4)
    is_seen = view.items > 0
    own = device_of(view.items) == view.events["device"]
    before = (view.items - 2) % NUM_ITEMS + 1
    was_replaced = np.isclose(view.events["dwell"], dwell_V[before])
    together = own & np.isclose(view.events["dwell"], dwell_V[view.items])
    assert (together | was_replaced)[is_seen].all()
    assert together[is_seen].mean() > 0.8 and was_replaced[is_seen].any()
    assert not view.events["dwell"][~is_seen].any()
    assert_together(view, dwell_V, is_seen & together)


def test_missing_values_and_outcomes_are_a_matter_of_the_schema(tmp_path):
    """The same file with the number as the context: a mask then hides the device."""
    dataset = load(tmp_path, LOG, context=("dwell",))
    batch = source_of(dataset)[0]
    assert batch.next.keys() == {"item", "dwell"}
    np.testing.assert_allclose(batch.next["dwell"], [[0, 0, UNIT, -UNIT, 0, 0, 0, 0]], rtol=1e-6)
    view = changed(batch, mask=1.0)
    assert not view.items.any() and not view.events["device"].any()
    np.testing.assert_array_equal(view.events["dwell"], batch.events["dwell"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceConfig(SASRecConfig):
    type: Literal["device"] = "device"


EVERY = AugmentConfig(crop=0.5, mask=0.4, reorder=0.8, substitute=0.4)


@pytest.fixture
def run_config(monkeypatch):
    """A function of further sections: the config of a run. All that was added is a model and its config."""
    monkeypatch.setitem(MODELS, DeviceConfig, DeviceSASRec)
    return functools.partial(
        ExperimentConfig,
        data=DataConfig(max_len=MAX_LEN),
        model=DeviceConfig(**SMALL),
        optim=OptimConfig(type="sgd", learning_rate=0.1),
        train=TrainConfig(epochs=2, batch_rows=16, micro_rows=4),
        augment=EVERY,
        eval=EvalConfig(bootstrap=0, baselines=()),
    )


def two_steps(config, dataset):
    """(losses, parameters before, parameters after)."""
    model, params = init_model(model_builder(config.model, NUM_ITEMS, MAX_LEN, schema=dataset.schema), seed=0)
    before, losses = jax.device_get(params), []
    counts = dataset.split.train_item_counts(dataset.histories)
    step = make_step(config, model, counts, make_mesh(config.mesh), neighbours_VK=NEIGHBOURS)
    state, source = step.init(before), source_of(dataset, batch_rows=16)
    for index in range(2):
        state, metrics = step(state, place_batch(source[index], step.mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return losses, before, jax.device_get(step.tables.unplace(state.params))


def test_steps_train_what_reads_them_and_are_the_same_on_every_mesh(large, run_config):
    """Under every change, with two views; histories are compared among four rows."""
    views = ContrastiveConfig(weight=0.1, view="augment", augment=EVERY)
    losses, before, after = two_steps(run_config(contrastive=views, mesh=MeshConfig(data=1)), large)
    other, _, _ = two_steps(run_config(contrastive=views, mesh=MeshConfig(data=4)), large)
    np.testing.assert_allclose(other, losses, rtol=2e-5)
    moved = np.any(after["devices"]["embedding"] != before["devices"]["embedding"], axis=-1)
    np.testing.assert_array_equal(moved, [False, True, True])  # the devices of the log
    assert np.all(after["dwell"] != before["dwell"])


def test_steps_that_read_some_entries_of_the_items_read_all_columns(large, run_config):
    loss = SampledSoftmaxConfig(num_negatives=5)
    losses, _, dense = two_steps(run_config(loss=loss, mesh=MeshConfig(data=1)), large)
    table = TableConfig(optimizer="sgd", learning_rate=0.1, layout="rows")
    other, _, sparse = two_steps(run_config(loss=loss, table=table, mesh=MeshConfig(data=2, model=2)), large)
    np.testing.assert_allclose(other, losses, rtol=2e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), sparse, dense)


def test_a_run_from_the_file_to_the_evaluation(large, run_config, tmp_path):
    config = run_config()
    result = Experiment(config, tmp_path / "run", dataset=large).fit()
    assert result.steps == 2 * source_of(large, batch_rows=16).steps_per_epoch

    bare = dataclasses.replace(large, schema=large.schema[:1])
    with pytest.raises(ValueError, match="reads device, dwell of each event, .* in data.features, or see"):
        Experiment(config, tmp_path / "bare", dataset=bare)
