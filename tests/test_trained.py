"""Trained models on disk: they are read back as they were written, also after failures and damages."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax import trained, versions
from rec_jax.compress.quant import QuantConfig, quantize_params
from rec_jax.data.datasets import Dataset
from rec_jax.data.histories import Histories, leave_one_out
from rec_jax.data.schema import make_schema
from rec_jax.data.strings import Strings
from rec_jax.data.user_histories import last_events
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.models.base import init_model
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.tables.layouts import RowSharded
from rec_jax.trained import TrainedModel
from rec_jax.tree import cast_floats, with_leaf

MAX_LEN, NUM_ITEMS = 4, 300
SECTION = {"type": "sasrec", "num_layers": 1, "width": 32, "ff_width": 32}
CONFIG = {
    "data": {"max_len": MAX_LEN}, "model": SECTION,
    "compress": {"quant": {"aware": False}}, "table": {"layout": "replicated"},
}  # fmt: skip


def make_dataset() -> Dataset:
    # The second user has items 1 and 5 only before the last four events, and item 2 also among these.
    items = np.array([1, 2, 3, 1, 5, 2, 1, 2, 4, 6, 7, 9, 9, 9], np.int32)
    histories = Histories(
        items=items,
        times=np.arange(14) * 10,
        offsets=np.array([0, 3, 11, 14]),
        user_ids=np.array(["ann", "böb", "cat"], object),
        item_ids=np.array(["", *(f"item {i}" for i in range(1, NUM_ITEMS + 1))], object),
        titles={"item 2": "Töst", "item 300": "last"},
        features={"price": np.arange(14) / 2, "shop": np.arange(14, dtype=np.int32) % 3},
        feature_values={"shop": ("", "näher", "far")},
    )
    split = leave_one_out(histories)
    return Dataset(histories, split, [], None, make_schema(histories, split, context=("shop",)))


DATASET = make_dataset()


@pytest.fixture(scope="module")
def params():
    return init_model(lambda rngs: SASRec(SASRecConfig(**CONFIG["model"]), NUM_ITEMS, MAX_LEN, rngs=rngs), 0)[
        1
    ]


def save(folder, params, step=1, **options) -> TrainedModel:
    trained.save(folder, params, step, CONFIG, DATASET, **options)
    return TrainedModel.load(folder)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def pruned(params):
    rng = np.random.default_rng(0)

    def prune(x):
        return jnp.asarray(np.where(rng.uniform(size=x.shape) < 0.7, x.dtype.type(0), x))

    return jax.tree.map(prune, params)


def quantized(params, **fields):
    return quantize_params(params, QuantConfig(names=".*(kernel|embedding)", **fields))


def test_parameters_are_read_back_bit_for_bit(params, tmp_path):
    half = cast_floats(params, jnp.bfloat16)
    for written in (params, pruned(params), half, pruned(half)):
        assert_same(save(tmp_path, written).params, written)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_parameters_are_read_back_bit_for_bit(params, tmp_path, bits):
    written = quantized(params, inputs="dynamic", table_bits=bits, symmetric=False)
    assert_same(save(tmp_path, written).params, written)


def test_arrays_are_memory_maps_and_contain_no_pickles(params, tmp_path):
    model = save(tmp_path, params)
    assert isinstance(model.params["items"]["embedding"], np.memmap)
    for path in model.folder.glob("*.npy"):
        np.load(path, allow_pickle=False)


def test_quantized_and_pruned_parameters_take_less_space(params, tmp_path):
    whole = save(tmp_path, params).param_bytes
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    assert num_bytes < whole < 1.1 * num_bytes
    assert save(tmp_path, quantized(params)).param_bytes < 0.35 * whole
    assert save(tmp_path, pruned(params)).param_bytes < 0.42 * whole
    assert save(tmp_path, quantized(pruned(params))).param_bytes < 0.2 * whole


def test_catalogue_and_users_are_read_back(params, tmp_path):
    model = save(tmp_path, params)
    assert model.step == 1 and model.num_items == NUM_ITEMS and model.config == CONFIG
    assert list(model.item_ids)[:3] == ["", "item 1", "item 2"] and model.titles[2] == "Töst"
    assert model.titles[300] == "last" and model.titles[3] == "" and len(model.titles) == NUM_ITEMS + 1
    np.testing.assert_array_equal(model.train_counts, DATASET.split.train_item_counts(DATASET.histories))
    users = model.users
    assert list(users.ids) == ["ann", "böb", "cat"]
    np.testing.assert_array_equal(users.offsets, [0, 3, 7, 10])
    np.testing.assert_array_equal(users.items, [1, 2, 3, 2, 4, 6, 7, 9, 9, 9])
    np.testing.assert_array_equal(users.times, [0, 10, 20, 70, 80, 90, 100, 110, 120, 130])
    np.testing.assert_array_equal(users.seen_offsets, [0, 0, 2, 2])
    np.testing.assert_array_equal(users.seen_items, [1, 5])
    np.testing.assert_array_equal(users.features["price"], np.arange(14)[[*range(3), *range(7, 14)]] / 2)
    np.testing.assert_array_equal(users.features["shop"], np.arange(14)[[*range(3), *range(7, 14)]] % 3)
    assert model.schema == DATASET.schema and len(model.schema) == 3 and not model.schema[2].is_outcome


def test_users_can_be_left_out(params, tmp_path):
    model = save(tmp_path, params, with_users=False)
    assert not list(model.folder.glob("users*"))
    with pytest.raises(ValueError, match="without keeping users .*: give a history"):
        model.users  # noqa: B018


def test_last_events_of_random_histories():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = rng.integers(1, 9, offsets[-1]).astype(np.int32)
    users = np.arange(50).astype(str).astype(object)
    histories = Histories(items, None, offsets, users, np.arange(9).astype(str).astype(object))
    for max_len in (1, 3, 20):
        last = last_events(histories, max_len)
        assert last.times is None
        for user in range(50):
            whole = items[offsets[user] : offsets[user + 1]]
            kept = last.items[last.offsets[user] : last.offsets[user + 1]]
            early = last.seen_items[last.seen_offsets[user] : last.seen_offsets[user + 1]]
            np.testing.assert_array_equal(kept, whole[-max_len:])
            np.testing.assert_array_equal(early, sorted(set(whole) - set(kept)))


def test_a_sharded_table_is_written_in_the_order_of_ids(params, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "_CHUNK_BYTES", 1_000)  # many chunks, the last one shorter
    mesh = make_mesh(MeshConfig(data=4, model=2))
    layout = RowSharded(NUM_ITEMS + 1, mesh)
    table = trained.ShardedTable(layout.place(params["items"]["embedding"]), layout.placement)
    assert_same(save(tmp_path, with_leaf(params, "items/embedding", table)).params, params)


def test_two_versions_are_kept_and_share_unchanged_files(params, tmp_path):
    for step in (3, 6, 9):
        save(tmp_path, params, step)
    root = tmp_path / "model"
    assert sorted(x.name for x in root.iterdir()) == ["000002", "000003", "current"]
    assert TrainedModel.load(tmp_path).step == 9
    assert (root / "000002/item_ids.data.npy").samefile(root / "000003/item_ids.data.npy")
    assert not (root / "000002/params.final_norm.scale.array.npy").samefile(
        root / "000003/params.final_norm.scale.array.npy"
    )


def test_a_process_killed_while_writing_leaves_the_old_version(params, tmp_path, monkeypatch):
    save(tmp_path, params, 3)
    calls = []

    def killed(*args, real=np.save):
        calls.append(args)
        if len(calls) > 5:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, pruned(params), 6)
    monkeypatch.undo()
    model = TrainedModel.load(tmp_path)
    assert model.step == 3
    assert_same(model.params, params)
    assert save(tmp_path, params, 9).step == 9  # the incomplete version does no harm


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["params.items.embedding.array.npy", "users.items.npy", "about.json"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (Path.unlink, "is missing|cannot be read"),
        (truncate, "bytes, but .* were written|cannot be read"),
        (flip, "another checksum|cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_version_is_reported_and_the_previous_one_is_read(
    params, tmp_path, capsys, name, damage, message
):
    save(tmp_path, params, 3)
    newest = save(tmp_path, pruned(params), 6)
    path = newest.folder / name
    whole = path.read_bytes()
    path.unlink()  # it can be a hard link into the other version
    path.write_bytes(whole)
    damage(path)
    model = TrainedModel.load(tmp_path)
    assert model.step == 3
    assert_same(model.params, params)
    output = capsys.readouterr().err
    assert str(path) in output and "falling back to" in output
    with pytest.raises(versions.DamagedError, match=message):
        versions.check(newest.folder)


def test_an_error_says_what_to_do_if_no_version_is_intact(params, tmp_path):
    truncate(save(tmp_path, params).folder / "item_ids.data.npy")
    with pytest.raises(ValueError, match="item_ids.data.npy has .* bytes.*run the command .* once more"):
        TrainedModel.load(tmp_path)


def test_a_pointer_to_a_missing_version_falls_back(params, tmp_path, capsys):
    save(tmp_path, params, 3)
    (tmp_path / "model/current").write_text("000077")
    assert TrainedModel.load(tmp_path).step == 3
    assert "000077" in capsys.readouterr().err


def test_missing_runs_and_runs_of_other_versions_are_refused(params, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no run"):
        TrainedModel.load(tmp_path / "nothing")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="no trained model yet .*trained by another version of rec_jax: train again"
    ):
        TrainedModel.load(tmp_path / "old")
    monkeypatch.setattr(versions, "FORMAT", 0)
    save(tmp_path, params)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="has format 0, .*trained by another version of rec_jax: train again"
    ):
        TrainedModel.load(tmp_path)
    config = json.loads(json.dumps(CONFIG))
    config["model"]["no_such_key"] = 1
    trained.save(tmp_path / "keys", params, 1, config, DATASET)
    with pytest.raises(ValueError, match="trained by another version of rec_jax.*no_such_key"):
        TrainedModel.load(tmp_path / "keys").model  # noqa: B018


def test_other_data_are_refused(params, tmp_path):
    model = save(tmp_path, params)
    model.check_data(DATASET)
    other = make_dataset()
    other.histories.item_ids[1] = "renamed"
    with pytest.raises(ValueError, match=f"vocabulary {model.vocabulary}, but these data have vocabulary "):
        model.check_data(other)


def test_an_ensemble_needs_one_split_and_models_that_score_every_item(params, tmp_path):
    one, two = save(tmp_path / "a", params), save(tmp_path / "b", params)
    trained.check_ensemble([one, two])
    two.about["made_of"]["split"] = "f00"
    with pytest.raises(ValueError, match=f"b was trained on split f00, .*a on split {one.split}"):
        trained.check_ensemble([one, two])
    two.about["made_of"]["split"] = one.split
    object.__setattr__(two.model, "is_generative", True)
    trained.check_same_split([one, two])  # they can be compared
    trained.check_ensemble([two])  # alone it is accepted
    with pytest.raises(ValueError, match="scores cannot be averaged with others: leave it out"):
        trained.check_ensemble([one, two])


def test_strings_are_stored_without_loss():
    texts = ["", "a", "bé", "", "日本"]
    strings = Strings.of(texts)
    assert list(strings) == texts and len(strings) == 5 and strings.index["日本"] == 4
    assert strings.to_arrow().to_pylist() == texts and list(Strings.of([])) == []
    with pytest.raises(IndexError):
        strings[5]
