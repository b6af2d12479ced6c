"""The planner: layouts, the choice of one, and a step compiled for more devices than there are."""

import os
import re
import subprocess
import sys

import pytest
from in_process import CONFIGS, ROOT, command, failure

LARGE = f"--config={CONFIGS}/large_tables.py"


@pytest.fixture
def plan(capsys):
    """Runs the command and returns its output."""

    def run(*args) -> str:
        capsys.readouterr()
        command("plan", *args)
        return capsys.readouterr().out

    return run


def test_a_table_of_a_billion_rows_compiles_for_sixty_four_devices():
    """In its own process, which has so many devices."""
    command = [sys.executable, "-m", "experiments.plan", "--config=configs/large_tables.py:1b", "--compile"]
    env = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout
    assert "1,000,000,001 entries x 64" in text and "64 devices" in text
    assert re.search(r"rows +4\.00 GB +62\.50 MB .* yes +<-", text)
    assert re.search(r"replicated +256\.00 GB .* no", text)
    assert re.search(r"state and batch +4\.06 GB, of which 4\.06 GB are updated in place", text)
    assert float(re.search(r"temporaries +([\d.]+) MB", text)[1]) < 100
    assert "all-to-all" in text and "all-gather" not in text


def test_the_rule_chooses_a_layout_unless_the_config_does(plan):
    mesh = ("--config.mesh.data=2", "--config.mesh.model=4", "--config.table.optimizer=lazy_adam")
    auto = plan(LARGE, *mesh, "--config.table.layout=auto")
    assert re.search(r"replicated .* <-", auto) and "fewest bytes" in auto
    small = plan(LARGE, *mesh, "--config.table.layout=auto", "--config.table.device_gbytes=2.0")
    assert re.search(r"replicated .* no", small) and re.search(r"dims .* yes +<-", small)
    assert re.search(r"rows .* <-", plan(LARGE, *mesh))


def test_mistakes_are_named():
    assert "--num_items=N is needed" in failure("plan", f"--config={CONFIGS}/sasrec_ml1m.py")
    assert "batch_rows=64" in failure("plan", LARGE, "--config.mesh.data=7")
