"""The lock of a working directory, tested with real processes."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

from rec_jax.config import build
from rec_jax.experiment import Experiment
from rec_jax.run_config import ExperimentConfig
from rec_jax.workdir import LOCK, training_lock

ROOT = pathlib.Path(__file__).parents[1]
_HOLD = """
import sys
from rec_jax.workdir import training_lock
assert "jax" not in sys.modules
with training_lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the lock of tmp_path until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_training_is_refused_and_the_first_is_named(tmp_path, holder):
    with pytest.raises(ValueError) as error, training_lock(tmp_path):
        pass
    name = rf"pid {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-.* UTC \(-c "
    assert re.search(f"another training is running there, {name}", str(error.value))
    assert "another directory" in str(error.value)


def test_the_lock_is_released_when_its_process_is_killed(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert f"pid {holder.pid}" in (tmp_path / LOCK).read_text()  # not cleaned up, but not locked either
    with training_lock(tmp_path):
        assert f"pid {os.getpid()} " in (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_text() == ""


def test_an_error_releases_the_lock(tmp_path):
    with pytest.raises(KeyError), training_lock(tmp_path):
        raise KeyError
    with training_lock(tmp_path):  # also excludes a second training of the same process
        with pytest.raises(ValueError, match=f"pid {os.getpid()} "), training_lock(tmp_path):
            pass
        assert f"pid {os.getpid()} " in (tmp_path / LOCK).read_text()


def test_a_refused_training_writes_nothing(tmp_path, holder, monkeypatch):
    from configs import log

    experiment = Experiment(build(ExperimentConfig, log.get_config("sasrec-smoke")), tmp_path)
    (tmp_path / "model.npz").write_text("of an earlier run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=f"pid {holder.pid} "):
        experiment.fit()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
