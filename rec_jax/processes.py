"""Several processes of one run: initialisation, barriers, broadcasts. Free where there is only one.

They share a file system. Process 0 prints and writes for all; all compute the same, each feeding its devices.
A process that fails leaves without waiting for the others. JAX ends these with a message of its own: at once
if process 0 has failed, and else, at the latest, when a process has given no sign of life for 100 s.
"""

import contextlib
import itertools
import os
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

_DAY_MS = 24 * 3600 * 1000
_places = itertools.count()


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several that share all devices. Must run before JAX is first used.

    What is None comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; where all three are
    missing, nothing happens.

    Args:
      coordinator: HOST:PORT where process 0 is to listen; or "auto" alone, on a cluster that JAX detects.
    """
    # Its handler would swallow a SIGTERM that comes before the training, which has one of its own.
    jax.config.update("jax_enable_preemption_service", False)
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator == "auto":
        if num_processes is not None or process_id is not None:
            raise ValueError("--coordinator=auto finds out all: leave out --num_processes and --process_id")
        try:
            return jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"--coordinator=auto, but JAX detects no cluster here ({error}): give "
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
            f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id go together "
            "(in the environment JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID): give all "
            "three or none"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT of process 0, or auto")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} with --num_processes={num_processes}: processes count from 0 to "
            "num_processes - 1"
        )
    jax.distributed.initialize(coordinator, num_processes, process_id)


def _from_environment(name: str, value: int | None) -> int | None:
    text = os.environ.get(name)
    if value is not None or text is None:
        return value
    if not text.isdigit():
        raise ValueError(f"{name}={text!r} must be a number")
    return int(text)


def is_first() -> bool:
    """Whether this process prints and writes for all."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Returns once all processes have come to this place, however long that takes."""
    if jax.process_count() > 1:  # not by a collective: on a CPU the first one gives up after 30 s
        from orbax.checkpoint import multihost  # slow to import

        multihost.get_barrier_sync_fn()(key=f"rec_jax_{next(_places)}", timeout_ms=_DAY_MS)


@contextlib.contextmanager
def first_before_others():
    """Process 0 runs the block, and when it is done the others do: they find what it wrote."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def largest(number: int) -> int:
    """Of the numbers, int32, that the processes give."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def of_first(value: float) -> float:
    """What process 0 gives, bit for bit: decisions must not hang on the rounding of one machine."""
    if jax.process_count() == 1:
        return value
    bits = np.array([value], np.float64).view(np.uint32)  # JAX would round an f64
    return float(multihost_utils.broadcast_one_to_all(bits).view(np.float64)[0])


def whole(array) -> np.ndarray:
    """An array on the host of every process, wherever its parts are; all must call it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def check_same(name: str, value: str) -> None:
    """Raises ValueError in all processes if they do not give the same text."""
    digest = zlib.crc32(value.encode()) >> 1
    if jax.process_count() > 1 and largest(digest) != -largest(-digest):
        raise ValueError(f"the processes have different {name}: start all of them with the same flags")
