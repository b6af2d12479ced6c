"""One training at a time in a working directory."""

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
    """Holds WORKDIR/training.lock, which names this process.

    The kernel drops the lock when its process ends, by SIGKILL too: it never has to be removed by hand. The
    file stays, empty while nobody trains.

    Raises ValueError, naming the process, if a training has the lock: another one, or one of this process.
    """
    with (pathlib.Path(workdir) / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise ValueError(
                f"--workdir={workdir}: a training is running there, {holder}. Wait until it ends, stop it, "
                "or train in another directory"
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
