"""The commands of the README, as a user runs them, and the smoke variant of every config."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from rec_jax.config import build
from rec_jax.experiment import Experiment
from rec_jax.run_config import ExperimentConfig

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "common"))


def run(*args, fails=False, timeout=900):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(
        [sys.executable, "-m", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    output = run("experiments.train", "--config=configs/sasrec_ml1m.py:smoke", f"--workdir={workdir}")
    return workdir, output


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "sasrec_ml1m"])
def test_every_config_has_a_smoke_run(name, tmp_path):
    """In this process, which spares each the start of one; the one above is that of a user."""
    cfg = importlib.import_module(f"configs.{name}").get_config("smoke")
    cfg.mesh.data, cfg.eval.baselines = 2, ("popularity",)
    cfg.train.checkpoint_every_steps = 0  # where it evaluates is enough
    experiment = Experiment(build(ExperimentConfig, cfg), tmp_path)
    test = experiment.evaluate(experiment.ranker(experiment.fit().best_params), "test")
    baselines = experiment.evaluate_baselines("test")
    popularity, oracle = (baselines[name]["unfiltered/ndcg@10"] for name in ("popularity", "oracle"))
    assert popularity < test["unfiltered/ndcg@10"] < oracle


def test_train_writes_what_it_says(trained):
    workdir, output = trained
    for name in ("config.json", "metrics.jsonl", "checkpoints", "curves.png", "result.json", "tensorboard"):
        assert (workdir / name).exists()
    result = json.loads((workdir / "result.json").read_text())
    for key in ("val", "test", "baselines", "train_secs", "real_tokens_per_sec", "steps", "params"):
        assert key in result
    assert result["real_tokens_per_sec"] > 0
    assert "of the oracle's unfiltered/ndcg@10" in output
    popularity = result["baselines"]["popularity"]["ndcg@10"]
    assert popularity < result["test"]["ndcg@10"] < result["baselines"]["oracle"]["ndcg@10"]


def test_evaluate_repeats_the_score_of_the_run(trained):
    workdir, _ = trained
    output = run("experiments.evaluate", f"--workdir={workdir}", "--split=test")
    result = json.loads((workdir / "result.json").read_text())
    again = json.loads((workdir / "evaluation_test.json").read_text())
    assert again["model"] == result["test"]
    assert "bigram" in output and "history length" in output


def test_a_run_and_its_copy_are_an_ensemble_that_is_no_better(trained, tmp_path):
    workdir, _ = trained
    copy = shutil.copytree(workdir, tmp_path / "copy")
    run("experiments.evaluate", f"--workdir={copy},{workdir}")
    scores = json.loads((copy / "evaluation_test_ensemble.json").read_text())
    assert scores["ensemble"]["over"][str(workdir)] == {"ratio": 1.0, "ratio_ci": [1.0, 1.0], "p": 1.0}
    assert scores["ensemble"]["mrr"] == scores[str(copy)]["mrr"] == scores[str(workdir)]["mrr"]


def test_recommend_answers_in_the_users_own_ids(trained):
    workdir, _ = trained
    by_user = run("experiments.recommend", f"--workdir={workdir}", "--user=u7", "--k=3")
    assert "the 3 best next items" in by_user
    by_history = run("experiments.recommend", f"--workdir={workdir}", "--history=i1,i2,i3", "--k=5")
    listed = by_history.split("best next items:")[1]
    assert not {"i1", "i2", "i3"} & set(listed.split())


def test_mistakes_are_named(trained, tmp_path):
    workdir, _ = trained
    error = run("experiments.recommend", f"--workdir={workdir}", "--history=i1,nope,i2", fails=True)
    assert "nope" in error and "Traceback" not in error
    error = run("experiments.recommend", f"--workdir={workdir}", "--user=nobody", fails=True)
    assert "nobody" in error
    error = run("experiments.evaluate", f"--workdir={tmp_path / 'none'}", fails=True)
    assert "holds no run" in error
    smoke = "--config=configs/sasrec_ml1m.py:smoke"
    error = run("experiments.train", smoke, f"--workdir={tmp_path}", "--config.model.num_heads=3", fails=True)
    assert "num_heads=3" in error and "Traceback" not in error
    error = run("experiments.train", smoke, f"--workdir={tmp_path}", "--config.train.epoch=3", fails=True)
    assert "epochs" in error and "Traceback" not in error


def test_help_helps():
    for name in ("train", "evaluate", "recommend", "compress", "benchmark", "plan"):
        done = subprocess.run(
            [sys.executable, "-m", f"experiments.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert f"python -m experiments.{name}" in done.stdout + done.stderr
