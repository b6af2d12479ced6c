"""A run that is killed on one mesh goes on on another: 8x1, 2x4, 1x1."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]


def start(workdir, data, model):
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        "--config=configs/large_tables.py:smoke",
        f"--workdir={workdir}",
        f"--config.mesh.data={data}",
        f"--config.mesh.model={model}",
        f"--config.mesh.fully_sharded={data > 1}",
        "--config.model.num_heads=4",
        "--config.train.epochs=20",
        "--config.train.log_every_steps=1",
        "--config.train.checkpoint_every_steps=6",
        "--config.train.eval_every_epochs=10.0",
        "--config.eval.bootstrap=0",
        "--config.eval.baselines=('popularity',)",
    ]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(data * model)}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(workdir) -> dict[int, float]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def kill_at(process, workdir, step):
    deadline = time.monotonic() + 600
    while max(losses(workdir), default=0) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()


def finish(process) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def test_a_killed_run_goes_on_on_another_mesh(tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    finish(start(whole, 1, 1))
    kill_at(start(moved, 8, 1), moved, 14)
    kill_at(start(moved, 2, 4), moved, 30)
    assert "resumed from step" in finish(start(moved, 1, 1))
    expected = losses(whole)
    assert max(expected) > 60 and losses(moved).keys() == expected.keys()
    for step, loss in losses(moved).items():
        np.testing.assert_allclose(loss, expected[step], rtol=2e-4, err_msg=f"step {step}")
    results = [json.loads((path / "result.json").read_text())["test"] for path in (whole, moved)]
    np.testing.assert_allclose(results[0]["ndcg@10"], results[1]["ndcg@10"], atol=0.01)
