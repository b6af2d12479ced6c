"""Commands as a user starts them, and the smoke variant of every config."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from in_process import CONFIGS, ROOT, command, failure, shared_compilations
from test_every_model import RUNS

from rec_jax.config import build
from rec_jax.experiment import Experiment
from rec_jax.run_config import ExperimentConfig

SMOKE = f"--config={CONFIGS}/sasrec_ml1m.py:smoke"
COMMANDS = sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if "__main__" in p.read_text())
# Without the config for a user's own log, which needs its path.
NAMES = {p.stem for p in CONFIGS.glob("*.py")} - {"__init__", "common", "log"}
# One config for each loss, table layout and kind of feed-forward layer that test_every_model does not train.
TRAINED = ("gsasrec_ml1m", "sasrec_bce_ml1m", "large_tables", "sasrec_moe_ml1m")
# test_every_model trains a config of each model type, test_reproduce a variant of ml100k.
TRACED = sorted(NAMES - set(TRAINED) - {config for config, _ in RUNS.values()})


def run(*args, fails=False, timeout=900):
    """Runs a command in its own process; returns stdout, or stderr if it must fail."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(
        [sys.executable, "-m", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """(workdir, output) of a training in its own process."""
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    settings = ("--config.mesh.data=2", "--config.train.epochs=6")
    output = run("experiments.train", SMOKE, f"--workdir={workdir}", *settings)
    return workdir, output


def smoke_experiment(name: str, workdir) -> Experiment:
    """The smoke variant of a config, small and without what it does not need to train."""
    cfg = importlib.import_module(f"configs.{name}").get_config("smoke")
    cfg.mesh.data, cfg.eval.baselines, cfg.eval.bootstrap = 2, ("popularity",), 0
    cfg.train.epochs, cfg.train.eval_every_epochs, cfg.train.checkpoint_every_steps = 6, 6.0, 0
    cfg.train.micro_rows = 16
    return Experiment(build(ExperimentConfig, cfg), workdir)


@pytest.mark.parametrize("name", TRAINED)
def test_smoke_runs_beat_popularity_and_not_the_oracle(name, tmp_path):
    with shared_compilations():
        experiment = smoke_experiment(name, tmp_path)
        test = experiment.evaluate(experiment.ranker(experiment.fit().best_params), "test")
    baselines = experiment.evaluate_baselines("test")
    popularity, oracle = (baselines[name]["unfiltered/ndcg@10"] for name in ("popularity", "oracle"))
    assert popularity < test["unfiltered/ndcg@10"] < oracle


@pytest.mark.parametrize("name", TRACED)
def test_smoke_configs_define_a_training_step(name, tmp_path):
    """These configs differ from trained ones in sizes and settings: their step is traced, not compiled."""
    experiment = smoke_experiment(name, tmp_path)
    assert "item embedding table" in experiment.describe()
    source = experiment.batch_source()
    step = experiment.step(len(source))
    state, metrics = step.lower(step.abstract_state(), source[0]).out_info
    assert state.params.keys() == experiment.model.abstract_params.keys()
    assert {"loss", "tokens"} <= metrics.keys()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_configs_are_valid(name):
    """Full-size settings: what is checked without data."""
    build(ExperimentConfig, importlib.import_module(f"configs.{name}").get_config())


def test_train_writes_its_files_and_prints_scores(trained):
    workdir, output = trained
    for name in ("config.json", "metrics.jsonl", "checkpoints", "curves.png", "result.json", "tensorboard"):
        assert (workdir / name).exists()
    result = json.loads((workdir / "result.json").read_text())
    for key in ("val", "test", "baselines", "train_secs", "real_tokens_per_sec", "steps", "params"):
        assert key in result
    assert result["real_tokens_per_sec"] > 0
    assert "of the oracle's unfiltered NDCG@10" in output
    popularity = result["baselines"]["popularity"]["ndcg@10"]
    assert popularity < result["test"]["ndcg@10"] < result["baselines"]["oracle"]["ndcg@10"]


def test_evaluate_repeats_the_score_of_the_run(trained, capsys):
    workdir, _ = trained
    command("evaluate", f"--workdir={workdir}", "--split=test")
    result = json.loads((workdir / "result.json").read_text())
    scores = json.loads((workdir / "evaluation_test.json").read_text())
    assert scores["model"] == result["test"]
    output = capsys.readouterr().out
    assert "bigram" in output and "history length" in output


def test_a_run_its_copy_and_their_ensemble_are_equally_good(trained, tmp_path):
    workdir, _ = trained
    copy = shutil.copytree(workdir, tmp_path / "copy")
    command("evaluate", f"--workdir={copy},{workdir}")
    scores = json.loads((copy / "comparison_test.json").read_text())
    equal = {"difference": 0.0, "difference_ci": [0.0, 0.0], "p": 1.0}
    assert scores[str(copy)]["over"] == {str(workdir): equal, "ensemble": equal}
    assert scores["ensemble"]["mrr"] == scores[str(copy)]["mrr"] == scores[str(workdir)]["mrr"]


def test_a_mistake_is_one_line_on_stderr(trained):
    workdir, _ = trained
    error = run("experiments.recommend", f"--workdir={workdir}", "--history=i1,nope,i2", fails=True)
    assert "error: " in error and "nope" in error and "Traceback" not in error


def test_mistakes_are_named(trained, tmp_path):
    workdir, _ = trained
    assert "nobody" in failure("recommend", f"--workdir={workdir}", "--user=nobody")
    assert "holds no run" in failure("evaluate", f"--workdir={tmp_path / 'none'}")
    train = ("train", SMOKE, f"--workdir={tmp_path}")
    assert "num_heads=3" in failure(*train, "--config.model.num_heads=3")
    assert 'Did you mean "epochs"' in failure(*train, "--config.train.epoch=3")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_how_to_start_the_command(name, capsys):
    with pytest.raises(SystemExit):
        command(name, "--help")
    output = "".join(capsys.readouterr())
    assert f"python -m experiments.{name}" in output
