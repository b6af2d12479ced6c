"""A lock that allows only one training at a time in a working directory."""

import contextlib
import datetime
import fcntl
import os
import pathlib
import shlex
import socket
import sys
from collections.abc import Iterator

LOCK = "training.lock"


@contextlib.contextmanager
def training_lock(workdir) -> Iterator[None]:
    """Holds a lock on WORKDIR/training.lock, in which it names this process.

    The kernel releases the lock when the process ends, even by SIGKILL, so nobody has to remove it by hand.
    The file stays; it is empty while no training runs.

    Raises ValueError, naming the process, if another training, even one of this process, has the lock.
    """
    with (pathlib.Path(workdir) / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise ValueError(
                f"--workdir={workdir}: another training is running there, {holder}: wait until it ends, stop "
                "it, or train in another directory"
            ) from None
        file.truncate(0)
        file.write(_this_process())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _this_process() -> str:
    since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"pid {os.getpid()} on {socket.gethostname()} since {since} ({shlex.join(sys.argv)})"
