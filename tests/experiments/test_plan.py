"""The planner as a user starts it."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def plan(*args, fails=False):
    command = [sys.executable, "-m", "experiments.plan", *args]
    env = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def test_a_billion_rows_on_sixty_four_devices_compile_here():
    text = plan("--config=configs/large_tables.py:1b", "--compile")
    assert "1,000,000,001 entries x 64" in text and "64 devices" in text
    assert re.search(r"rows +4\.00 GB +62\.50 MB .* yes +<-", text)
    assert re.search(r"replicated +256\.00 GB .* no", text)
    assert re.search(r"state and batch +4\.06 GB, of which 4\.06 GB are updated in place", text)
    assert float(re.search(r"temporaries +([\d.]+) MB", text)[1]) < 100
    assert "all-to-all" in text and "all-gather" not in text


def test_the_rule_chooses_unless_the_config_does():
    mesh = ("--config.mesh.data=2", "--config.mesh.model=4", "--config.table.optimizer=lazy_adam")
    auto = plan("--config=configs/large_tables.py", *mesh, "--config.table.layout=auto")
    assert re.search(r"replicated .* <-", auto) and "fewest bytes" in auto
    small = plan(
        "--config=configs/large_tables.py",
        *mesh,
        "--config.table.layout=auto",
        "--config.table.device_gbytes=2.0",
    )
    assert re.search(r"replicated .* no", small) and re.search(r"dims .* yes +<-", small)
    assert re.search(r"rows .* <-", plan("--config=configs/large_tables.py", *mesh))


def test_mistakes():
    assert "--num_items=N is needed" in plan("--config=configs/sasrec_ml1m.py", fails=True)
    assert "batch_rows=64" in plan("--config=configs/large_tables.py", "--config.mesh.data=7", fails=True)
