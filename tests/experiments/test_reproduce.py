"""Tables of results over seeds: the arithmetic by hand, and the command with smoke runs."""

import json

import numpy as np
import pytest
from in_process import CONFIGS, ROOT, command, failure

from experiments.reproduce import TABLES, Row, format_markdown, summarise
from rec_jax.models.registry import MODELS


def measured(ndcg_E, seed):
    values = {"ndcg@10": np.asarray(ndcg_E, float), "hr@10": np.ceil(ndcg_E), "users": np.arange(len(ndcg_E))}
    test = {"unfiltered/hr@10": 0.2, "unfiltered/ndcg@10": 0.1}
    return {
        "values": values, "test": test, "baselines": {}, "params": 10, "train_secs": 5.0 + seed,
        "command": f"python -m x --config.seed={seed}", "max_len": 8, "split": "leave_one_out, checksum 12",
        "filter_seen": True, "num_items": 30,
    }  # fmt: skip


def test_means_deviations_and_pairs_by_hand():
    rows = {"a": Row("a", 0.5, None, "a paper"), "b": Row("b")}
    good = [measured([1, 0.5, 0, 0.5] * 50, 0), measured([1, 0.5, 0.5, 1] * 50, 1)]
    bad = [measured([0, 0.5, 0, 0.5] * 50, 0)]
    figures = summarise(rows, {"b": bad, "a": good})
    assert list(figures) == ["a", "b"]  # best first
    a, b = figures["a"], figures["b"]
    assert a["ndcg@10"] == (0.5 + 0.75) / 2 and a["ndcg@10_of_seeds"] == [0.5, 0.75]
    assert a["ndcg@10_std"] == pytest.approx(np.std([0.5, 0.75], ddof=1)) and b["ndcg@10_std"] is None
    low, high = a["ndcg@10_ci"]
    assert 0.5 < low < a["ndcg@10"] < high < 0.75
    assert a["next_best"] == "b" and a["p_over_next_best"] < 0.01 and "p_over_next_best" not in b
    assert a["train_secs"] == 5.5 and a["hr@10_published"] == 0.5
    text = format_markdown(figures, {})
    assert "| a | 0.5000 / - | 0.8750 ± 0.1768 | 0.6250 ± 0.1768 |" in text
    assert "| b | - / - | 0.5000 | 0.2500 |" in text and "checksum 12" in text
    assert "python -m x --config.seed=0" in text and "Published: a paper" in text


def test_runs_on_different_splits_are_refused():
    other = {**measured([1, 0], 1), "split": "leave_one_out, checksum 34"}
    with pytest.raises(ValueError, match="split='leave_one_out, checksum 34' of b"):
        summarise({"a": Row("a"), "b": Row("b")}, {"a": [measured([1, 0], 0)], "b": [other]})


def test_a_table_of_two_seeds_reuses_finished_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")  # for the processes that train
    args = ("--table=ml100k", "--models=gru4rec", "--smoke", f"--output={tmp_path}")
    command("reproduce", *args, "--seeds=1")
    first = (tmp_path / "runs/gru4rec-0/result.json").stat().st_mtime_ns
    capfd.readouterr()
    command("reproduce", *args, "--seeds=2")
    assert (tmp_path / "runs/gru4rec-0/result.json").stat().st_mtime_ns == first
    output = capfd.readouterr().out
    assert "Smoke runs" in output and "| gru4rec |" in output and "| popularity |" in output
    assert "ml100k.py:gru4rec-smoke" in output and "global_temporal" in output
    table = json.loads((tmp_path / "table.json").read_text())
    figures = table["models"]["gru4rec"]
    results = [json.loads((tmp_path / f"runs/gru4rec-{seed}/result.json").read_text()) for seed in (0, 1)]
    assert figures["seeds"] == 2
    assert figures["ndcg@10"] == pytest.approx(np.mean([x["test"]["ndcg@10"] for x in results]))
    assert figures["ndcg@10"] > table["baselines"]["popularity"]["ndcg@10"]
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_every_row_has_its_config_and_a_wrong_name_lists_the_models(tmp_path):
    for table in TABLES.values():
        for row in table.values():
            assert (CONFIGS / f"{row.config.split(':')[0]}.py").exists()
    assert set(TABLES["ml100k"]) == {config.type for config in MODELS}
    error = failure("reproduce", "--table=ml1m", "--models=sasrecc", f"--output={tmp_path}")
    assert "sasrecc" in error and "bert4rec" in error
