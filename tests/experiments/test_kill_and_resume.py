"""Two equal trainings in their own processes: one runs without interruption, one is killed repeatedly."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from rec_jax.trained import TrainedModel

ROOT = pathlib.Path(__file__).parents[2]
KILLED_AT = (20, None, 60, 100)  # training steps of 192; None is the start-up


def start(workdir, cache):
    command = [sys.executable, "-m", "experiments.train", "--config=configs/sasrec_ml1m.py:smoke"]
    overrides = [
        f"--workdir={workdir}",
        "--config.train.epochs=32",
        "--config.train.checkpoint_every_steps=7",
        "--config.train.eval_every_epochs=4.0",
        "--config.model.num_layers=1",
        "--config.loss.type=sampled_softmax",
        "--config.eval.bootstrap=0",
        "--config.eval.baselines=()",
    ]
    # Two devices, to include reductions over a mesh; all starts share one compilation.
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env.pop("XLA_FLAGS", None)  # programs compiled as for users
    return subprocess.Popen(
        [*command, *overrides], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def last_step(workdir) -> int:
    """The last logged training step of a run in progress."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return 0


def outcome(workdir):
    """The bits of the final and best states, and the scores."""
    result = json.loads((workdir / "result.json").read_text())
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(TrainedModel.load(workdir).params)]
    evaluations = [
        {k: v for k, v in json.loads(line).items() if k == "step" or k.startswith("val/")}
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
        if "val/ndcg@10" in line
    ]
    final = sorted((workdir / "checkpoints").glob("*/*/record/metadata"), key=lambda p: int(p.parts[-3]))[-1]
    digests = json.loads(final.read_text())
    return leaves, evaluations, digests["record"]["digests"], result["test"], result["steps"]


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    """Equal to the bit, which also shows that a repeated run gives the same result."""
    cache = tmp_path / "compiled"
    finish(start(tmp_path / "whole", cache))
    uninterrupted = outcome(tmp_path / "whole")
    workdir, rng = tmp_path / "killed", random.Random(0)
    for step in KILLED_AT:
        process = start(workdir, cache)
        if step is None:
            time.sleep(rng.uniform(1, 4))
        else:
            deadline = time.monotonic() + 300
            while process.poll() is None and last_step(workdir) < step and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))  # before, during or after a save
        assert process.poll() is None, "the run ended before it was killed: " + process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
    output = finish(start(workdir, cache))
    assert "resumed from step" in output
    assert outcome(workdir) == uninterrupted
