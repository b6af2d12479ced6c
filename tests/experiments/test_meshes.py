"""A run that stops with an error on one mesh resumes on another: 8x1, 2x4, 1x1."""

import json

import numpy as np
import pytest
from in_process import CONFIGS, command

from rec_jax import mesh as mesh_lib


def train(workdir, data, model):
    command(
        "train",
        f"--config={CONFIGS}/large_tables.py:smoke",
        f"--workdir={workdir}",
        f"--config.mesh.data={data}",
        f"--config.mesh.model={model}",
        f"--config.mesh.fully_sharded={data > 1}",
        "--config.model.num_heads=4",
        "--config.model.num_layers=1",
        "--config.train.epochs=6",
        "--config.train.log_every_steps=1",
        "--config.train.checkpoint_every_steps=6",
        "--config.train.eval_every_epochs=3.0",
        "--config.eval.bootstrap=0",
        "--config.eval.baselines=('popularity',)",
    )


class Interrupted(Exception):
    pass


def train_until(num_batches, workdir, data, model, monkeypatch):
    """Trains, and fails at the batch after so many of this session."""
    place_batch, left = mesh_lib.place_batch, iter(range(num_batches))

    def place_some(batch, mesh):
        if next(left, None) is None:
            raise Interrupted
        return place_batch(batch, mesh)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(mesh_lib, "place_batch", place_some)
        train(workdir, data, model)


def losses(workdir) -> dict[int, float]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def test_an_interrupted_run_resumes_on_another_mesh(tmp_path, monkeypatch, capsys):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(whole, 1, 1)
    train_until(8, moved, 8, 1, monkeypatch)
    train_until(9, moved, 2, 4, monkeypatch)
    assert max(losses(moved)) == 6 + 9
    capsys.readouterr()
    train(moved, 1, 1)
    assert "resumed from step 12" in "".join(capsys.readouterr())
    expected = losses(whole)
    assert max(expected) > 20 and losses(moved).keys() == expected.keys()
    for step, loss in losses(moved).items():
        np.testing.assert_allclose(loss, expected[step], rtol=2e-4, err_msg=f"step {step}")
    results = [json.loads((path / "result.json").read_text())["test"] for path in (whole, moved)]
    np.testing.assert_allclose(results[0]["ndcg@10"], results[1]["ndcg@10"], atol=0.01)
