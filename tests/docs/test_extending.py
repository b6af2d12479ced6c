"""docs/extending.md applied to a copy of the tree: its model, feature and loss train as the page says."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from example_log import write_log
from pages import ROOT, apply_diff, blocks, blocks_of, commands

PAGE = ROOT / "docs/extending.md"
SMALL = (
    "--config.train.epochs=1", "--config.train.eval_every_epochs=1.0", "--config.train.patience=0",
    "--config.model.width=16", "--config.model.num_layers=1", "--config.eval.bootstrap=0",
)  # fmt: skip


def test_each_addition_is_short():
    for section in PAGE.read_text().split("\n## ")[1:]:
        added = 0
        for language, text in blocks_of(section):
            lines = text.splitlines()
            if language == "python":
                added += len(lines)
            elif language == "diff":
                added += sum(line.startswith("+") for line in lines)
        assert 0 < added < 60


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("extended") / "tree"
    for name in ("rec_jax", "experiments", "configs", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", root)
    write_log(root)
    return root


def test_the_page_works_as_written(tree):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["JAX_NUM_CPU_DEVICES"] = "1"
    for language, text in blocks(PAGE):
        if language == "python":
            (tree / text.splitlines()[0].removeprefix("# ")).write_text(text)
        elif language == "diff":
            apply_diff(text, tree)
        for command in commands(text):
            command = command.replace("scripts/test", "python -m pytest")
            _, *args = shlex.split(command)
            small = SMALL if "experiments.train" in command else ()
            done = subprocess.run(
                [sys.executable, *args, *small],
                cwd=tree,
                env=env,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, command + done.stdout + done.stderr
            if "experiments.train" in command:
                assert "ndcg@10" in done.stdout
