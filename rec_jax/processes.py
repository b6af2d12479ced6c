"""Several processes of one run: initialisation, barriers, broadcasts. No cost if there is only one process.

The processes share a file system. Process 0 prints and writes files for all. All run the same computation,
and each feeds data to its own devices. A process that fails exits without waiting for the others. JAX then
ends the others with its own error message: at once if process 0 has failed, otherwise at the latest 100 s
after the last heartbeat of the failed process.
"""

import contextlib
import itertools
import os
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

_DAY_MS = 24 * 3600 * 1000
_barriers = itertools.count()


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to the other processes of the run. Must run before JAX is first used.

    An argument that is None is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID. If all
    three are missing, there is only one process and nothing happens.

    coordinator: HOST:PORT where process 0 listens; or "auto", without the other two arguments, on a cluster
    that JAX detects.
    Raises ValueError if some of the three are missing or do not fit together.
    """
    # JAX's preemption handler would swallow a SIGTERM before the training, which installs its own handler.
    jax.config.update("jax_enable_preemption_service", False)
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator == "auto":
        if num_processes is not None or process_id is not None:
            raise ValueError(
                "--coordinator=auto detects the processes: leave out --num_processes and --process_id"
            )
        try:
            return jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"--coordinator=auto, but JAX detects no cluster ({error}): give "
                "--coordinator=HOST:PORT, --num_processes and --process_id"
            ) from error
    num_processes = _from_environment("JAX_NUM_PROCESSES", num_processes)
    process_id = _from_environment("JAX_PROCESS_ID", process_id)
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: give all three of --coordinator, --num_processes and "
            "--process_id, or none (the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID count as given)"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT of process 0, or auto")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} with --num_processes={num_processes}: give a number from 0 to "
            "num_processes - 1"
        )
    jax.distributed.initialize(coordinator, num_processes, process_id)


def _from_environment(name: str, value: int | None) -> int | None:
    text = os.environ.get(name)
    if value is not None or text is None:
        return value
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} must be a non-negative integer")
    return int(text)


def is_first() -> bool:
    """Whether this process is the one that prints and writes files for all."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Barrier: returns once all processes have called it, without a time limit that a run could reach."""
    if jax.process_count() > 1:  # not a collective: on a CPU a waiting collective times out after 30 s
        from orbax.checkpoint import multihost  # slow to import

        multihost.get_barrier_sync_fn()(key=f"rec_jax_{next(_barriers)}", timeout_ms=_DAY_MS)


@contextlib.contextmanager
def first_before_others():
    """Lets process 0 run the block first; the others run it afterwards and read the files that 0 wrote."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def largest(number: int) -> int:
    """Returns the largest of the numbers (int32) that the processes pass."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def of_first(value: float) -> float:
    """Returns the value that process 0 passes, bit for bit, so that a decision does not depend on rounding
    differences between machines."""
    if jax.process_count() == 1:
        return value
    bits = np.array([value], np.float64).view(np.uint32)  # as integers, since JAX would round an f64
    return float(multihost_utils.broadcast_one_to_all(bits).view(np.float64)[0])


def whole(array) -> np.ndarray:
    """Returns the whole array as a NumPy array in every process, gathering its shards. All processes must
    call it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def check_same(name: str, value: str) -> None:
    """Raises ValueError in all processes unless all of them pass the same text."""
    digest = zlib.crc32(value.encode()) >> 1
    if jax.process_count() > 1 and largest(digest) != -largest(-digest):
        raise ValueError(f"the processes have different {name}: start all of them with the same flags")
