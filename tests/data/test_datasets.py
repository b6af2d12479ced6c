import os
import time

import numpy as np
import pytest

from rec_jax.config import build, to_config_dict
from rec_jax.data import datasets
from rec_jax.data.datasets import DataConfig, load_dataset
from rec_jax.data.simulator import SimulatorConfig
from rec_jax.data.titles import read_titles

SMALL_WORLD = SimulatorConfig(num_items=20, num_users=30, num_interests=3, mean_len=8)


@pytest.fixture
def log(tmp_path):
    """A file with three users who have items 1 to 4 at times 10, 20, 30, 40, and one with a single event."""
    path = tmp_path / "log.csv"
    rows = [f"{user},i{item},{10 * item}" for user in "abc" for item in (1, 2, 3, 4)]
    path.write_text("\n".join(["user,item,time", *rows, "d,i1,15"]))
    return path


@pytest.fixture
def count_reads(monkeypatch):
    reads = []
    read = datasets.read_log
    monkeypatch.setattr(datasets, "read_log", lambda *args, **kw: reads.append(args) or read(*args, **kw))
    return reads


def test_data_are_prepared_once_and_reported(log, tmp_path, count_reads, capsys):
    config = DataConfig(path=str(log), max_len=3)
    first = load_dataset(config, tmp_path / "data")
    printed = capsys.readouterr().out
    second = load_dataset(config, tmp_path / "data")
    assert capsys.readouterr().out == (
        "data prepared before: 4 users, 4 items, 13 events, leave_one_out, checksum "
        f"{first.split.checksum[:12]}\n"
    )
    assert second.report == first.report
    assert len(count_reads) == 1
    for text in (
        "read as csv, detected by the name",
        "user=user, item=item, time=time",
        "as read",
        "leave_one_out",
    ):
        assert text in printed
    assert f"checksum {first.split.checksum}" in printed
    assert second.split.checksum == first.split.checksum
    assert isinstance(second.histories.items, np.memmap)
    assert first.world is None
    assert first.split.notes["users with fewer than 3 events, training only"] == 1


def test_data_are_prepared_again_when_config_or_file_changes(log, tmp_path, count_reads):
    load_dataset(DataConfig(path=str(log)), tmp_path / "data")
    load_dataset(DataConfig(path=str(log), max_len=7), tmp_path / "data")  # changes nothing on disk
    assert len(count_reads) == 1
    other = load_dataset(DataConfig(path=str(log), min_user_events=2), tmp_path / "data")
    assert len(count_reads) == 2 and other.histories.num_users == 3
    log.write_text(log.read_text() + "\ne,i1,50\n")
    os.utime(log, (time.time() + 5,) * 2)
    assert load_dataset(DataConfig(path=str(log)), tmp_path / "data").histories.num_users == 5
    assert len(count_reads) == 3


def test_other_files_are_not_overwritten(log, tmp_path):
    with pytest.raises(ValueError, match="contains other files"):
        load_dataset(DataConfig(path=str(log)), tmp_path)
    assert log.exists()


def test_a_damaged_directory_is_reported(log, tmp_path):
    load_dataset(DataConfig(path=str(log)), tmp_path / "data")
    items = np.load(tmp_path / "data" / "histories" / "items.npy", mmap_mode="r+")
    items[0] += 1
    items.flush()
    with pytest.raises(ValueError, match="data is damaged .*checksum.*: delete it"):
        load_dataset(DataConfig(path=str(log)), tmp_path / "data")
    (tmp_path / "data" / "histories" / "items.npy").unlink()
    with pytest.raises(ValueError, match="data is damaged .*items.npy.*: delete it"):
        load_dataset(DataConfig(path=str(log)), tmp_path / "data")
    (tmp_path / "data" / "prepared.json").write_text("{")
    with pytest.raises(ValueError, match="data is damaged .*: delete it"):
        load_dataset(DataConfig(path=str(log)), tmp_path / "data")


def test_a_prepared_directory_is_read_without_preparing_it_again(log, tmp_path, count_reads):
    made = load_dataset(DataConfig(path=str(log), min_user_events=2), tmp_path / "data")
    config = DataConfig(path=str(tmp_path / "data"), format="sasrec")  # reading fields have no effect
    again = load_dataset(config, tmp_path / "unused")
    assert again.split.checksum == made.split.checksum and len(count_reads) == 1
    assert not (tmp_path / "unused").exists()
    assert again.report == made.report
    with pytest.raises(ValueError, match="k_core=3, but .* was prepared with k_core=0: set k_core=0, or"):
        load_dataset(DataConfig(path=str(tmp_path / "data"), k_core=3), tmp_path / "unused")
    with pytest.raises(ValueError, match="split='global_temporal', but"):
        load_dataset(DataConfig(path=str(tmp_path / "data"), split="global_temporal"), tmp_path / "unused")
    with pytest.raises(
        ValueError, match="is a directory without prepared.json, so experiments.prepare_data did not"
    ):
        load_dataset(DataConfig(path=str(tmp_path)), tmp_path / "unused")


def test_global_temporal_split_by_times_and_by_fractions(log, tmp_path):
    config = DataConfig(path=str(log), split="global_temporal", val_time=30, test_time=40)
    split = load_dataset(config, tmp_path / "data").split
    assert (split.notes["training events"], split.notes["test targets"]) == (7, 3)
    config = DataConfig(path=str(log), split="global_temporal", val_fraction=0.25, test_fraction=0.2)
    dataset = load_dataset(config, tmp_path / "data")
    assert dataset.split.notes["first validation time"] == 30
    assert dataset.split.notes["first test time"] == 40
    assert "1970-01-01 00:00:40 UTC" in dataset.report[-1]


def test_a_simulated_log_is_reproducible(tmp_path, capsys):
    config = DataConfig(format="simulator", sim=SMALL_WORLD)
    dataset = load_dataset(config, tmp_path / "data")
    again = load_dataset(config, tmp_path / "data")
    assert dataset.world is not None and again.world is not None
    assert dataset.split.checksum == again.split.checksum
    assert dataset.histories.num_users == 30
    assert "simulated: SimulatorConfig(num_items=20" in capsys.readouterr().out
    other = DataConfig(format="simulator", sim=SimulatorConfig(**{**vars(SMALL_WORLD), "seed": 1}))
    assert load_dataset(other, tmp_path / "data").split.checksum != dataset.split.checksum


def test_relative_paths_are_looked_up_in_two_directories(log, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("REC_JAX_DATA", raising=False)
    with pytest.raises(ValueError, match=r"path='log.csv' does not exist .*elsewhere/log.csv.*REC_JAX_DATA"):
        load_dataset(DataConfig(path="log.csv"), "data")
    monkeypatch.setenv("REC_JAX_DATA", str(tmp_path))
    assert load_dataset(DataConfig(path="log.csv"), "data").histories.num_users == 4
    with pytest.raises(ValueError, match=r"titles='t.csv' does not exist .*elsewhere/t.csv and .*t.csv"):
        load_dataset(DataConfig(path="log.csv", titles="t.csv"), "data")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(max_len=0), "max_len=0 must be 1 or more"),
        (dict(val_time=5), "val_time=5, test_time=0: set both or neither"),
        (dict(val_time=5, test_time=6), "val_time=5 has no effect with split='leave_one_out'"),
        (dict(val_fraction=0.5, test_fraction=0.5), "their sum below 1"),
        (dict(titles_ids="x"), "titles_ids='x' has no effect without titles"),
        (
            dict(features=("price", "time")),
            "features=.*: time is reserved for the item or the time of an event",
        ),
        (dict(), "path='' is empty"),
        (dict(format="simulator", path="x"), "path='x' has no effect with format='simulator'"),
    ],
)
def test_wrong_configs_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_dataset(DataConfig(**fields), tmp_path / "data")


def test_a_config_is_built_from_its_dict():
    assert build(DataConfig, to_config_dict(DataConfig())) == DataConfig()
    with pytest.raises(ValueError, match="did you mean"):
        build(DataConfig, {"k_cores": 3})


def test_titles_are_read_from_every_format(tmp_path):
    dat = tmp_path / "movies.dat"
    dat.write_bytes("10::Amélie (2001)::Comedy\n\n20::Heat::Crime\n".encode("latin-1"))
    assert read_titles(dat) == {"10": "Amélie (2001)", "20": "Heat"}
    ids = tmp_path / "ids.txt"
    ids.write_text("1 20\n2 10\n3 99\n")
    assert read_titles(dat, ids) == {"1": "Heat", "2": "Amélie (2001)"}
    item = tmp_path / "ml.item"
    item.write_text('item_id:token\tmovie_title:token_seq\tclass:token_seq\n10\tThe "Heat"\tCrime\n')
    assert read_titles(item) == {"10": 'The "Heat"'}
    csv = tmp_path / "movies.csv"
    csv.write_text('movieId,title,genres\n10,"Heat, The",Crime\n')
    assert read_titles(csv) == {"10": "Heat, The"}
    csv.write_text("product,label\n10,Heat\n")
    assert read_titles(csv, item="product") == {"10": "Heat"}
    csv.write_text("movieId,label,genres\n10,Heat,Crime\n")
    with pytest.raises(ValueError, match="the item and title columns among movieId, label, genres"):
        read_titles(csv)
    dat.write_text("10::Heat::Crime\n20 Alien\n")
    with pytest.raises(ValueError, match="line 2: '20 Alien' has no '::': expected `item::title"):
        read_titles(dat)


def test_ml1m_has_titles_and_is_read_in_seconds(real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(
        path="ml-1m/ml-1m.txt", titles="ml-1m/movies.dat", titles_ids="ml-1m/sas_to_original_items.txt"
    )
    start = time.perf_counter()
    histories = load_dataset(config, tmp_path / "data").histories
    assert time.perf_counter() - start < 10  # about 0.6 s on an idle core
    assert histories.titles["1"] == "Raiders of the Lost Ark (1981)"
    assert len(histories.titles) == 3416
