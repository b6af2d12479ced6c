"""Runs of two processes on one machine, compared with runs of one process with the same number of devices."""

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

from configs import large_tables
from rec_jax import processes
from rec_jax.config import build
from rec_jax.experiment import Experiment
from rec_jax.run_config import ExperimentConfig

ROOT = pathlib.Path(__file__).parents[2]
OVERRIDES = {
    "mesh.data": 4,
    "train.epochs": 4,
    "train.eval_every_epochs": 2.0,
    "model.num_layers": 1,
    "train.log_every_steps": 1,
    "eval.bootstrap": 0,
    "eval.sampled_negatives": 10,
    "eval.baselines": (),
}


def evaluated(experiment: Experiment) -> dict:
    return experiment.evaluate(experiment.trained.ranker(experiment.mesh), "test")


def train_alone(workdir) -> dict:
    """Test metrics of a run in this process."""
    cfg = large_tables.get_config("smoke")
    cfg.update_from_flattened_dict(OVERRIDES)
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


def train(workdir, cache) -> list[subprocess.Popen]:
    options = [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    return start("train", workdir, cache, "--config=configs/large_tables.py:smoke", *options)


def finish(running, timeout=600) -> list[str]:
    """The output of each process; no process survives."""
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


def test_two_processes_train_stop_resume_and_evaluate_as_one(tmp_path):
    """With a row-sharded table: each process saves and restores its own part."""
    one, workdir, cache = tmp_path / "one", tmp_path / "two", tmp_path / "compiled"
    test = train_alone(one)
    running = train(workdir, cache)
    try:
        stop_after_first_log(running, workdir, 1, signal.SIGTERM)
        shown, silent = finish(running)
    finally:
        for process in running:
            process.kill()
    assert "SIGTERM: stopped and saved at step" in shown and "SIGTERM" not in silent
    stopped_at = max(losses(workdir))
    assert stopped_at < max(losses(one)) and not (workdir / "result.json").exists()

    shown, silent = finish(train(workdir, cache))
    assert f"resumed from step {stopped_at} " in shown and "checksum" in shown
    assert "step" not in silent and "checksum" not in silent
    assert losses(workdir).keys() == losses(one).keys()
    np.testing.assert_allclose(list(losses(workdir).values()), list(losses(one).values()), rtol=1e-5)
    assert json.loads((workdir / "result.json").read_text())["test"] == test

    # One process reads the model that two saved, and two read the model that one saved.
    assert evaluated(Experiment.open(workdir)) == test
    finish(start("evaluate", one, cache, "--split=test"))
    assert json.loads((one / "evaluation_test.json").read_text())["model"] == test


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
def test_inconsistent_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        processes.connect(*flags)
