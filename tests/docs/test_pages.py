"""Every command and every Python block of the README and docs/ runs, on a small log."""

import re
import shlex

import pytest
from example_log import write_log
from in_process import command as run
from pages import PAGES, ROOT, blocks, commands

SMALL = (
    "--config.train.epochs=1", "--config.train.eval_every_epochs=1.0", "--config.train.patience=0",
    "--config.mesh.data=1", "--config.eval.bootstrap=10", "--config.eval.baselines=('popularity',)",
    "--config.model.num_layers=1",
)  # fmt: skip
# Commands that another test runs, with what it must contain.
ELSEWHERE = {
    "scripts/": ("tests/docs/test_pages.py", "test_scripts"),
    "--coordinator": ("tests/experiments/test_multiprocess.py", "--coordinator"),
    "--suite=pareto": ("tests/experiments/test_compress_command.py", "pareto"),
    "experiments.reproduce": ("tests/experiments/test_reproduce.py", "experiments.reproduce"),
    "--compile": ("tests/experiments/test_plan.py", "--compile"),
    "extending.md": ("tests/docs/test_extending.py", "PAGE"),
}
NOT_PROGRAMS = {"architecture.md", "extending.md"}  # protocols in short; files for another test


def shortened(line: str) -> list[str]:
    """The arguments of a command, made small; without a log in them, on simulated data."""
    _, _, module, *args = shlex.split(line)
    args = [re.sub(r"^--config=(configs/(?!log)\w+\.py)$", r"--config=\1:smoke", arg) for arg in args]
    args = [arg.replace("--config=configs", f"--config={ROOT}/configs") for arg in args]
    if module == "experiments.train":
        args += SMALL
        if any(arg.startswith("--config.data.path") for arg in args):
            args += ["--config.data.max_len=16", "--config.model.width=16"]
    return [module.removeprefix("experiments."), *args]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a log, and with the runs that the README trains."""
    folder = tmp_path_factory.mktemp("world")
    write_log(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for _, text in blocks(PAGES[0]):
            for line in commands(text):
                if "experiments.train" in line:
                    run(*shortened(line))
        (folder / "runs/quickstart").symlink_to(folder / "runs/mine")
        yield folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, world):
    for language, text in blocks(page):
        if language == "python" and page.name not in NOT_PROGRAMS:
            exec(compile(text, str(page), "exec"), {})
        for line in commands(text):
            if (page.name == "README.md" and "experiments.train" in line) or page.name == "extending.md":
                continue  # `world` has run it; test_extending.py
            if match := [test for part, test in ELSEWHERE.items() if part in line]:
                path, part = match[0]
                assert part in (ROOT / path).read_text()
            else:
                run(*shortened(line))


def test_scripts():
    for name in ("quickstart", "test"):
        assert (ROOT / "scripts" / name).stat().st_mode & 0o100
