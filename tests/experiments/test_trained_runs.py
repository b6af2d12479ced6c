"""The answers of a trained run depend neither on later changes of its log nor on the current directory."""

import json
import shutil

import numpy as np
import pytest
from in_process import CONFIGS, command

from rec_jax.data.simulator import SimulatorConfig, World

SETTINGS = (
    f"--config={CONFIGS}/sasrec_ml1m.py:smoke", "--config.train.epochs=3", "--config.mesh.data=1",
    "--config.model.num_layers=1", "--config.train.micro_rows=16", "--config.eval.baselines=('popularity',)",
    "--config.eval.bootstrap=0", "--config.train.eval_every_epochs=1.0", "--config.data.user=user",
    "--config.data.item=item", "--config.data.time=time",
)  # fmt: skip


def events(seed=0, num_items=40, num_users=200):
    """Lines of a log, ordered by user."""
    log = World(
        SimulatorConfig(seed=seed, num_items=num_items, num_users=num_users, num_interests=4, mean_len=10)
    ).sample()
    return [f"u{u},i{i},{t}" for t, (u, i) in enumerate(zip(log.users, log.items, strict=True))]


def write(path, lines):
    path.write_text("\n".join(["user,item,time", *lines]) + "\n")


def train(workdir, log, *flags):
    command(
        "train",
        *SETTINGS,
        f"--workdir={workdir}",
        "--config.data.format=auto",
        f"--config.data.path={log}",
        *flags,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, lines of the log): folder/run was trained on folder/log.csv."""
    folder = tmp_path_factory.mktemp("trained")
    lines = events()
    write(folder / "log.csv", lines)
    train(folder / "run", folder / "log.csv")
    return folder, lines


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run that a test may change."""
    folder, lines = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copy2(folder / "log.csv", tmp_path / "log.csv")
    config = tmp_path / "run/config.json"
    config.write_text(config.read_text().replace(str(folder), str(tmp_path)))
    return tmp_path, lines


def recommended(folder, capsys) -> str:
    capsys.readouterr()
    command("recommend", f"--workdir={folder / 'run'}", "--history=i5,i6,i7")
    return capsys.readouterr().out.split("next items:")[1]


def evaluated(folder) -> float:
    command("evaluate", f"--workdir={folder / 'run'}")
    return json.loads((folder / "run/evaluation_test.json").read_text())["model"]["ndcg@10"]


def reported(folder) -> float:
    return json.loads((folder / "run/result.json").read_text())["test"]["ndcg@10"]


def test_the_order_of_lines_in_the_log_changes_nothing(run, capsys):
    folder, lines = run
    before = recommended(folder, capsys)
    write(folder / "log.csv", np.random.default_rng(0).permutation(lines).tolist())
    assert recommended(folder, capsys) == before
    assert evaluated(folder) == reported(folder)


def test_another_split_of_the_same_directory_is_refused(tmp_path, capsys):
    write(tmp_path / "log.csv", events())
    prepare = ("--format=csv", "--user=user", "--item=item", "--time=time", "--split=global_temporal")
    prepare = (f"--input={tmp_path / 'log.csv'}", f"--output={tmp_path / 'data'}", *prepare)
    command("prepare_data", *prepare, "--test_fraction=0.1")
    train(tmp_path / "run", tmp_path / "data", "--config.data.split=global_temporal")
    assert evaluated(tmp_path) == reported(tmp_path)
    checksum = json.loads((tmp_path / "data/split/split.json").read_text())["checksum"]
    command("prepare_data", *prepare, "--test_fraction=0.3")
    other = json.loads((tmp_path / "data/split/split.json").read_text())["checksum"]
    with pytest.raises(ValueError, match=f"split checksum {checksum}.* have split checksum {other}"):
        evaluated(tmp_path)
    assert "i" in recommended(tmp_path, capsys)


def test_a_new_item_in_the_log_is_named_when_training_resumes(run, capsys):
    folder, lines = run
    before = recommended(folder, capsys)
    write(folder / "log.csv", ["u1,brand_new,0", *lines])
    assert recommended(folder, capsys) == before
    assert evaluated(folder) == reported(folder)
    with pytest.raises(
        ValueError, match=r"items \(was 40, is now 41\), events .*split checksum.*another workdir"
    ):
        train(folder / "run", folder / "log.csv", "--config.train.log_every_steps=3")
    assert evaluated(folder) == reported(folder)  # the data of the run are still present
    write(folder / "log.csv", lines)
    train(folder / "run", folder / "log.csv", "--config.train.log_every_steps=3")  # accepted: the same log


def test_only_training_needs_the_log(run, capsys, monkeypatch):
    folder, _ = run
    before = recommended(folder, capsys)
    (folder / "log.csv").unlink()
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert recommended(folder, capsys) == before
    assert evaluated(folder) == reported(folder)


def test_a_relative_path_of_the_log_is_supported(tmp_path, capsys, monkeypatch):
    write(tmp_path / "log.csv", events())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", "log.csv")
    before = recommended(tmp_path, capsys)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert recommended(tmp_path, capsys) == before
    assert evaluated(tmp_path) == reported(tmp_path)


def test_changed_times_are_refused_although_the_split_is_the_same(run):
    """Every event is an hour later: the times that a model may read change, items and split do not."""
    folder, lines = run
    later = [f"{user},{item},{int(time) + 3600}" for user, item, time in (line.split(",") for line in lines)]
    write(folder / "log.csv", later)
    prepared = (folder / "run/data/histories/times.npy").read_bytes()
    score = evaluated(folder)
    with pytest.raises(ValueError, match="the data differ from those.*column time"):
        train(folder / "run", folder / "log.csv")
    assert (folder / "run/data/histories/times.npy").read_bytes() == prepared
    assert evaluated(folder) == score
