"""Two processes on this machine, as a user starts them, against one with as many devices."""

import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from rec_jax import processes
from rec_jax.config import build
from rec_jax.experiment import Experiment
from rec_jax.run_config import ExperimentConfig

ROOT = pathlib.Path(__file__).parents[2]
OVERRIDES = {
    "mesh.data": 4,
    "model.num_layers": 1,
    "train.log_every_steps": 1,
    "eval.bootstrap": 0,
    "eval.sampled_negatives": 10,
    "eval.baselines": (),
}


def evaluated(experiment: Experiment) -> dict:
    return experiment.evaluate(experiment.trained.ranker(experiment.mesh), "test")


def alone(name, workdir, overrides) -> dict:
    """Test metrics of a run in this process."""
    cfg = importlib.import_module(f"configs.{name}").get_config("smoke")
    cfg.update_from_flattened_dict(OVERRIDES | overrides)
    experiment = Experiment(build(ExperimentConfig, cfg), workdir)
    experiment.fit()
    return evaluated(experiment)


def start(command, workdir, cache, *options) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_NUM_PROCESSES": "2"}
    arguments = ["-m", f"experiments.{command}", f"--workdir={workdir}", *options]
    return [
        subprocess.Popen(
            [sys.executable, *arguments, f"--coordinator=127.0.0.1:{port}", f"--process_id={index}"],
            **dict(cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True),
        )
        for index in range(2)
    ]


def train(name, workdir, cache, overrides) -> list[subprocess.Popen]:
    options = [f"--config.{key}={value}" for key, value in (OVERRIDES | overrides).items()]
    return start("train", workdir, cache, f"--config=configs/{name}.py:smoke", *options)


def finish(running, timeout=600) -> list[str]:
    """What each has printed; none is left behind."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    return outputs


def stop_after_first_log(running, workdir, index: int, number, timeout=600) -> None:
    deadline = time.monotonic() + timeout
    path = workdir / "metrics.jsonl"
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        assert running[index].poll() is None, running[index].stdout.read()
        time.sleep(0.005)
    running[index].send_signal(number)


def losses(workdir) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def assert_same_run(workdir, other) -> None:
    assert losses(workdir).keys() == losses(other).keys()
    np.testing.assert_allclose(list(losses(workdir).values()), list(losses(other).values()), rtol=1e-5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def test_a_run_of_two_is_stopped_resumed_and_equal_to_one(tmp_path, cache):
    name, workdir, overrides = "sasrec_ml1m", tmp_path / "two", {"train.epochs": 6}
    running = train(name, workdir, cache, overrides)
    try:
        stop_after_first_log(running, workdir, 1, signal.SIGTERM)
        shown, silent = finish(running)
    finally:
        for process in running:
            process.kill()
    assert "SIGTERM: stopped and saved at step" in shown and "SIGTERM" not in silent
    stopped_at = max(losses(workdir))
    assert stopped_at < 36 and not (workdir / "result.json").exists()

    shown, silent = finish(train(name, workdir, cache, overrides))
    assert f"resumed from step {stopped_at} " in shown and "checksum" in shown
    assert "step" not in silent and "checksum" not in silent
    test = alone(name, tmp_path / "one", overrides)
    assert_same_run(workdir, tmp_path / "one")
    assert json.loads((workdir / "result.json").read_text())["test"] == test


def test_spread_rows_and_their_checkpoints(tmp_path, cache):
    name, overrides = "large_tables", {"train.epochs": 2}
    finish(train(name, tmp_path / "two", cache, overrides))
    test = alone(name, tmp_path / "one", overrides)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert json.loads((tmp_path / "two" / "result.json").read_text())["test"] == test

    # What two have saved is read by one, and the reverse.
    assert evaluated(Experiment.open(tmp_path / "two")) == test
    finish(start("evaluate", tmp_path / "one", cache, "--split=test"))
    assert json.loads((tmp_path / "one" / "evaluation_test.json").read_text())["model"] == test


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("127.0.0.1:1", None, None), "--num_processes and --process_id missing"),
        ((None, 2, 0), "--coordinator missing"),
        (("localhost", 2, 0), "--coordinator=localhost must be HOST:PORT"),
        (("127.0.0.1:1", 2, 2), "--process_id=2 with --num_processes=2"),
        (("auto", 2, None), "leave out --num_processes"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        processes.connect(*flags)
