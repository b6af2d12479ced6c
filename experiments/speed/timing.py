"""Timing on a machine shared with other work: functions run alternately and are compared pair by pair."""

import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

_PEAK_SIZE = 2048


def interleaved(runs: dict, repeats: int, note=lambda repeat: None) -> dict[str, np.ndarray]:
    """Calls the functions alternately, A B C A B C ..., `repeats` times each.

    runs: name -> function without arguments that does some work and waits for it. Each is called once
    beforehand, to compile it. Returns {name: seconds, f64[repeats]}.
    """
    for run in runs.values():
        run()
    secs = {name: np.zeros(repeats) for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            secs[name][repeat] = time.perf_counter() - start
        note(repeat)
    return secs


def peak_run():
    """Returns (function that multiplies two f32 matrices on all cores, its floating-point operations).

    Its rate is the limit that the reported percentages refer to.
    """
    a = jnp.ones((_PEAK_SIZE, _PEAK_SIZE), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    return lambda: multiply(a).block_until_ready(), 2 * _PEAK_SIZE**3


def machine() -> dict:
    """Describes the machine that the figures were measured on."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "devices": [str(device) for device in jax.devices()],
        "load_average_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
