"""What a trained run answers does not hang on the log it was trained on, nor on where the process runs."""

import json
import shutil

import numpy as np
import pytest
from in_process import CONFIGS, command

from rec_jax.data.simulator import SimulatorConfig, World

SETTINGS = (
    f"--config={CONFIGS}/sasrec_ml1m.py:smoke", "--config.train.epochs=3", "--config.mesh.data=1",
    "--config.eval.bootstrap=0", "--config.train.eval_every_epochs=1.0", "--config.data.user=user",
    "--config.data.item=item", "--config.data.time=time",
)  # fmt: skip


def events(seed=0, num_items=40, num_users=200):
    """Lines of a log, by users."""
    log = World(
        SimulatorConfig(seed=seed, num_items=num_items, num_users=num_users, num_interests=4, mean_len=10)
    ).sample()
    return [f"u{u},i{i},{t}" for t, (u, i) in enumerate(zip(log.users, log.items, strict=True))]


def write(path, lines):
    path.write_text("\n".join(["user,item,time", *lines]) + "\n")


def train(workdir, log, *more):
    command(
        "train",
        *SETTINGS,
        f"--workdir={workdir}",
        "--config.data.format=auto",
        f"--config.data.path={log}",
        *more,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, lines of the log): trained on folder/log.csv in folder/run."""
    folder = tmp_path_factory.mktemp("trained")
    lines = events()
    write(folder / "log.csv", lines)
    train(folder / "run", folder / "log.csv")
    return folder, lines


@pytest.fixture
def run(made, tmp_path):
    """A copy of it to change."""
    folder, lines = made
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copy2(folder / "log.csv", tmp_path / "log.csv")
    config = tmp_path / "run/config.json"
    config.write_text(config.read_text().replace(str(folder), str(tmp_path)))
    return tmp_path, lines


def recommended(folder, capsys, *more) -> str:
    capsys.readouterr()
    command("recommend", f"--workdir={folder / 'run'}", *(more or ("--history=i5,i6,i7",)))
    return capsys.readouterr().out.split("next items:")[1]


def scored(folder) -> float:
    command("evaluate", f"--workdir={folder / 'run'}")
    return json.loads((folder / "run/evaluation_test.json").read_text())["model"]["ndcg@10"]


def result(folder) -> float:
    return json.loads((folder / "run/result.json").read_text())["test"]["ndcg@10"]


def test_the_order_of_lines_in_the_log_changes_nothing(run, capsys):
    folder, lines = run
    before = recommended(folder, capsys)
    write(folder / "log.csv", np.random.default_rng(0).permutation(lines).tolist())
    assert recommended(folder, capsys) == before
    assert scored(folder) == result(folder)


def test_another_split_of_the_same_directory_is_refused(tmp_path, capsys):
    write(tmp_path / "log.csv", events())
    prepare = ("--format=csv", "--user=user", "--item=item", "--time=time", "--split=global_temporal")
    prepare = (f"--input={tmp_path / 'log.csv'}", f"--output={tmp_path / 'data'}", *prepare)
    command("prepare_data", *prepare, "--test_fraction=0.1")
    train(tmp_path / "run", tmp_path / "data", "--config.data.split=global_temporal")
    assert scored(tmp_path) == result(tmp_path)
    checksum = json.loads((tmp_path / "data/split/split.json").read_text())["checksum"]
    command("prepare_data", *prepare, "--test_fraction=0.3")
    other = json.loads((tmp_path / "data/split/split.json").read_text())["checksum"]
    with pytest.raises(ValueError, match=f"split checksum {checksum}.* have split checksum {other}"):
        scored(tmp_path)
    assert "i" in recommended(tmp_path, capsys)


def test_a_new_item_in_the_log_is_said_to_be_that(tmp_path, capsys):
    folder, lines = tmp_path, events()
    write(folder / "log.csv", lines)
    train(folder / "run", folder / "log.csv")
    before = recommended(folder, capsys)
    write(folder / "log.csv", ["u1,brand_new,0", *lines])
    assert recommended(folder, capsys) == before
    assert scored(folder) == result(folder)
    with pytest.raises(
        ValueError, match=r"items \(was 40, is now 41\), events .*split checksum.*another workdir"
    ):
        train(folder / "run", folder / "log.csv", "--config.train.log_every_steps=3")
    assert scored(folder) == result(folder)  # what the run was trained on is still there
    write(folder / "log.csv", lines)
    train(folder / "run", folder / "log.csv", "--config.train.log_every_steps=3")  # the same log: it resumes


def test_the_log_is_needed_to_train_only(run, capsys, monkeypatch):
    folder, _ = run
    before = recommended(folder, capsys)
    (folder / "log.csv").unlink()
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert recommended(folder, capsys) == before
    assert scored(folder) == result(folder)


def test_a_relative_path_of_the_log(tmp_path, capsys, monkeypatch):
    write(tmp_path / "log.csv", events())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", "log.csv")
    before = recommended(tmp_path, capsys)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert recommended(tmp_path, capsys) == before
    assert scored(tmp_path) == result(tmp_path)


def test_other_times_are_other_data_though_the_split_is_the_same(run):
    """Every event an hour later: what a model of times would read has changed, the items and the split have
    not."""
    folder, lines = run
    later = [f"{user},{item},{int(time) + 3600}" for user, item, time in (line.split(",") for line in lines)]
    write(folder / "log.csv", later)
    prepared = (folder / "run/data/histories/times.npy").read_bytes()
    score = scored(folder)
    with pytest.raises(ValueError, match="the data differ from those.*column time"):
        train(folder / "run", folder / "log.csv")
    assert (folder / "run/data/histories/times.npy").read_bytes() == prepared
    assert scored(folder) == score
