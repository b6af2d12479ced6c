"""`python -m experiments.compress` as a user runs it, on a small run of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(*args, fails=False):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compress") / "run"
    smoke = "--config=configs/sasrec_ml1m.py:smoke"
    run("experiments.train", smoke, f"--workdir={workdir}", "--config.train.epochs=4")
    return workdir


def test_the_suite_compares_recipes_and_its_runs_are_runs(trained, tmp_path):
    recipes = "--recipes=int8,prune70_int8,distill25,alone25"
    few = "--config.train.epochs=2"
    output = run(
        "experiments.compress", f"--workdir={trained}", "--suite=pareto", f"--output={tmp_path}", recipes, few
    )
    rows = json.loads((tmp_path / "pareto.json").read_text())
    assert list(rows) == ["f32", "int8", "prune70_int8", "distill25", "alone25"]
    assert rows["f32"]["ndcg_kept"] == rows["f32"]["bytes_ratio"] == rows["f32"]["flops_ratio"] == 1
    for name, row in rows.items():
        low, high = row["ndcg_kept_ci"]
        assert low <= row["ndcg_kept"] <= high and name in output
        assert 0 < row["p50_ms_batch1"] <= row["p99_ms_batch1"] and row["compiled_flops_batch64"] > 0
    assert rows["int8"]["ndcg_kept"] > 0.98 and rows["int8"]["memory_ratio"] < 0.45
    assert rows["prune70_int8"]["bytes_ratio"] < rows["int8"]["bytes_ratio"]
    assert rows["distill25"]["params_ratio"] <= 0.25 and rows["distill25"]["flops_ratio"] < 0.3
    assert rows["distill25"]["ndcg_over_alone25_ci"][0] > 0
    assert "| int8 |" in (tmp_path / "pareto.md").read_text()
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    run("experiments.evaluate", f"--workdir={tmp_path / 'prune70_int8'}", "--split=test")
    again = json.loads((tmp_path / "prune70_int8" / "evaluation_test.json").read_text())
    assert again["model"]["ndcg@10"] == pytest.approx(rows["prune70_int8"]["ndcg@10"])
    assert "next items" in run(
        "experiments.recommend", f"--workdir={tmp_path / 'int8'}", "--user=u7", "--k=3"
    )


def test_a_diagnosis_has_a_row_for_each_parameter(trained, tmp_path):
    output = run(
        "experiments.compress", f"--workdir={trained}", "--suite=diagnose", f"--output={tmp_path}"
    )  # fmt: skip
    tables = json.loads((tmp_path / "diagnosis.json").read_text())
    names = [row[0] for row in tables["sensitivity"][1]]
    assert names.count("items/embedding") == 1 and len(names) == 12 and names[0] in output
    whole, *pruned = (float(x) for x in tables["sensitivity"][1][names.index("items/embedding")][1:])
    assert len(pruned) == 4 and pruned[-1] < whole  # nine tenths of the table are missed
    assert len(tables["weights"][1]) == 32 and all("nan" not in row for row in tables["weights"][1])


def test_mistakes_are_named(trained, tmp_path):
    workdir = f"--workdir={trained}"
    error = run("experiments.compress", workdir, f"--output={trained}", fails=True)
    assert "name another directory" in error and "Traceback" not in error
    wrong = "--config.compress.recipe=int9"
    error = run("experiments.compress", workdir, f"--output={tmp_path}", wrong, fails=True)
    assert "'int9' is unknown: use bf16, int8" in error and "Traceback" not in error
