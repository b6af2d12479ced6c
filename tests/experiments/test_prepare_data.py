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
    for option in ("--input", "--format", "--delimiter", "--k_core", "--split", "--output", "Reads, cleans"):
        assert option in text
