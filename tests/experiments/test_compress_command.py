"""`python -m experiments.compress` on a small run: the suites in this process, an error in its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from in_process import CONFIGS, command

from experiments import pareto

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compress") / "run"
    command(
        "train", f"--config={CONFIGS}/sasrec_ml1m.py:smoke", f"--workdir={workdir}", "--config.mesh.data=1",
        "--config.train.epochs=4", "--config.train.eval_every_epochs=4.0", "--config.model.num_layers=1",
        "--config.eval.bootstrap=0", "--config.eval.baselines=()",
    )  # fmt: skip
    return workdir


def test_the_pareto_suite_compares_recipes_and_writes_runs(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pareto, "_CALLS", {1: 20, 64: 5})
    command(
        "compress", f"--workdir={trained}", "--suite=pareto", f"--output={tmp_path}",
        "--recipes=int8,distill25,alone25", "--config.train.epochs=2",
    )  # fmt: skip
    output = capsys.readouterr().out
    rows = json.loads((tmp_path / "pareto.json").read_text())
    assert list(rows) == ["f32", "int8", "distill25", "alone25"]
    assert rows["f32"]["ndcg_kept"] == rows["f32"]["bytes_ratio"] == rows["f32"]["flops_ratio"] == 1
    for name, row in rows.items():
        low, high = row["ndcg_kept_ci"]
        assert low <= row["ndcg_kept"] <= high and name in output
        assert 0 < row["p50_ms_batch1"] <= row["p99_ms_batch1"] and row["compiled_flops_batch64"] > 0
    assert rows["int8"]["ndcg_kept"] > 0.98 and rows["int8"]["memory_ratio"] < 0.45
    assert rows["distill25"]["params_ratio"] <= 0.25 and rows["distill25"]["flops_ratio"] < 0.3
    assert rows["distill25"]["ndcg_over_alone25_ci"][0] > 0
    assert "| int8 |" in (tmp_path / "pareto.md").read_text()
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    command("evaluate", f"--workdir={tmp_path / 'distill25'}", "--split=test")
    evaluation = json.loads((tmp_path / "distill25" / "evaluation_test.json").read_text())
    assert evaluation["model"]["ndcg@10"] == pytest.approx(rows["distill25"]["ndcg@10"])


def test_the_diagnosis_has_a_row_for_each_parameter(trained, tmp_path, capsys):
    command("compress", f"--workdir={trained}", "--suite=diagnose", f"--output={tmp_path}")
    tables = json.loads((tmp_path / "diagnosis.json").read_text())
    names = [row[0] for row in tables["sensitivity"][1]]
    assert names.count("items/embedding") == 1 and len(names) == 7 and names[0] in capsys.readouterr().out
    unpruned, *pruned = (float(x) for x in tables["sensitivity"][1][names.index("items/embedding")][1:])
    assert len(pruned) == 4 and pruned[-1] < unpruned  # with 90 % of the table at 0
    assert len(tables["weights"][1]) == 18 and all("nan" not in row for row in tables["weights"][1])


def test_mistakes_end_the_command_with_a_message(trained, tmp_path):
    with pytest.raises(ValueError, match="name another directory"):
        command("compress", f"--workdir={trained}", f"--output={trained}")
    flags = (f"--workdir={trained}", f"--output={tmp_path}", "--config.compress.recipe=int9")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compress", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    assert "'int9' is unknown: use bf16, int8" in done.stderr and "Traceback" not in done.stderr
