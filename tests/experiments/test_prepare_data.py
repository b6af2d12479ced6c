import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from in_process import FLAGS, command

from rec_jax.data.datasets import DataConfig, load_dataset

ROOT = pathlib.Path(__file__).parents[2]


def prepare_data(capsys, *args) -> str:
    """Runs the command in this process and returns its output."""
    command("prepare_data", *args)
    return capsys.readouterr().out


def test_a_csv_file_becomes_a_prepared_directory(tmp_path, capsys):
    log = tmp_path / "log.csv"
    rows = [f"{user};p{item};{item}000;{item}" for user in "ab" for item in range(1, 6)]
    log.write_text("\n".join(["customer;product;when;stars", *rows, "c;p5;1000;5", ";p1;1000;5"]))
    out = tmp_path / "out"
    printed = prepare_data(
        capsys,
        f"--input={log}",
        *("--format=csv", "--delimiter=;", "--user=customer", "--item=product", "--time=when"),
        *("--rating=stars", "--time_unit=ms", "--min_rating=2", "--min_user_events=2", "--features=stars"),
        f"--output={out}",
    )
    for text in (
        "read as csv, as requested",
        "1 row without a user left out",
        "min_rating=2",
        "checksum",
        f"written to {out}: to train on it, set --config.data.path={out}",
    ):
        assert text in printed
    dataset = load_dataset(DataConfig(path=str(out)), tmp_path / "unused")
    assert dataset.split.checksum in printed
    assert dataset.histories.user_ids.tolist() == ["a", "b"]
    assert dataset.histories.times.tolist() == [2, 3, 4, 5] * 2
    assert dataset.histories.features["stars"].tolist() == [2, 3, 4, 5] * 2


def test_a_csv_file_and_its_prepared_directory_have_the_same_audit(tmp_path, capsys):
    log, out = tmp_path / "log.csv", tmp_path / "out"
    rows = [f"{user},p{(user + i) % 12},{100 * i // 3}" for user in range(8) for i in range(10 + user % 2)]
    log.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    printed = prepare_data(capsys, f"--input={log}", f"--output={out}", "--audit")
    assert "Audit: 8 users, 12 items, 84 events, leave_one_out, 8 test targets" in printed
    assert "of test targets are ranked in the top 10 by the same rule" in printed
    about = json.loads((out / "audit.json").read_text())
    dataset = load_dataset(DataConfig(path=str(out)), tmp_path / "unused")
    assert about["checksum"] == dataset.split.checksum and about["has_times"]
    figures = about["figures"]
    assert figures["bigram_hit@1"]["value"] == 1  # each item follows the item with the number before
    assert figures["twin_users"]["value"] == 0 and "copies" in figures["twin_users"]["meaning"]
    assert (out / "audit.png").read_bytes().startswith(b"\x89PNG")

    printed = prepare_data(capsys, f"--input={out}", f"--output={tmp_path / 'other'}", "--audit")
    assert (tmp_path / "other" / "audit.json").read_text() == (out / "audit.json").read_text()
    assert "written to" not in printed


def test_an_error_is_one_line_and_nothing_is_written(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user,item\n1,2\n1\n")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.prepare_data", f"--input={log}", f"--output={tmp_path / 'out'}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {log}, line 3: '1' has 1 field")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_setting_of_the_data_has_an_option(tmp_path, capsys):
    (tmp_path / "log.csv").write_text("user,item\na,1\na,2\na,3\n")
    prepare_data(capsys, f"--input={tmp_path / 'log.csv'}", f"--output={tmp_path / 'out'}")
    options = {flag.name for flag in FLAGS.get_key_flags_for_module("experiments.prepare_data")}
    not_prepared = {"path", "max_len", "context", "sim"}
    settings = {field.name for field in dataclasses.fields(DataConfig)} - not_prepared
    assert options == settings | {"input", "audit", "output"}
