import json
import os
import pathlib
import subprocess
import sys

from rec_jax.data.datasets import DataConfig, load_dataset

ROOT = pathlib.Path(__file__).parents[2]


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "experiments.prepare_data", *args],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_csv_to_directory(tmp_path):
    log = tmp_path / "log.csv"
    rows = [f"{user};p{item};{item}000;{item}" for user in "ab" for item in range(1, 6)]
    log.write_text("\n".join(["customer;product;when;stars", *rows, "c;p5;1000;5", ";p1;1000;5"]))
    out = tmp_path / "out"
    done = run(
        f"--input={log}",
        *("--format=csv", "--delimiter=;", "--user=customer", "--item=product", "--time=when"),
        *("--rating=stars", "--time_unit=ms", "--min_rating=2", "--min_user_events=2", "--features=stars"),
        f"--output={out}",
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "read as csv, as told",
        "1 row without a user left out",
        "min_rating=2",
        "checksum",
        str(out),
    ):
        assert text in done.stdout
    dataset = load_dataset(DataConfig(path=str(out)), tmp_path / "unused")
    assert dataset.split.checksum in done.stdout
    assert dataset.histories.user_ids.tolist() == ["a", "b"]
    assert dataset.histories.times.tolist() == [2, 3, 4, 5] * 2
    assert dataset.histories.features["stars"].tolist() == [2, 3, 4, 5] * 2


def test_audit_of_a_csv_and_of_what_was_prepared(tmp_path):
    log, out = tmp_path / "log.csv", tmp_path / "out"
    rows = [f"{user},p{(user + i) % 12},{100 * i // 3}" for user in range(8) for i in range(10 + user % 2)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    done = run(f"--input={log}", f"--output={out}", "--audit")
    assert done.returncode == 0, done.stderr
    assert "Audit: 8 users, 12 items, 84 events, leave_one_out, 8 test targets" in done.stdout
    assert "of test targets are among the first 10 by the same rule" in done.stdout
    about = json.loads((out / "audit.json").read_text())
    dataset = load_dataset(DataConfig(path=str(out)), tmp_path / "unused")
    assert about["checksum"] == dataset.split.checksum and about["has_times"]
    figures = about["figures"]
    assert figures["bigram_hit@1"]["value"] == 1  # each item follows the one of the number before
    assert figures["twin_users"]["value"] == 0 and "copies" in figures["twin_users"]["meaning"]
    assert (out / "audit.png").read_bytes().startswith(b"\x89PNG")

    again = run(f"--input={out}", f"--output={tmp_path / 'other'}", "--audit")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "other" / "audit.json").read_text() == (out / "audit.json").read_text()
    assert "written to" not in again.stdout


def test_errors_are_one_line(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user,item\n1,2\n1\n")
    done = run(f"--input={log}", f"--output={tmp_path / 'out'}")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {log}, line 3: '1' has 1 field")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_names_every_option():
    text = run("--help").stdout
    for option in (
        "--input",
        "--format",
        "--delimiter",
        "--k_core",
        "--split",
        "--audit",
        "--output",
        "Reads, cleans",
    ):
        assert option in text
