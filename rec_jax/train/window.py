"""Metrics of the steps between two logs, summed on the device."""

import collections
import time

import jax
import jax.numpy as jnp

_MAX_STEPS_AHEAD = 4  # Steps that the host may queue: enough to hide its own work, with bounded memory.


class Window:
    """Metrics and duration of the steps since the last log. Limits how far the host runs ahead."""

    def __init__(self):
        self.is_first = True  # the first window has one step, which compiles
        self._sums, self._in_flight = None, collections.deque()

    def open(self) -> None:
        """Starts the clock, if this is the first step of the window."""
        if self._sums is None:
            self._start = time.perf_counter()

    def add(self, metrics: dict, step: int) -> None:
        self._sums = _add(self._sums, metrics, step)
        self._in_flight.append(self._sums["first_bad"])
        if len(self._in_flight) > _MAX_STEPS_AHEAD:
            self._in_flight.popleft().block_until_ready()

    def close(self) -> tuple[dict, int, float]:
        """Waits for the device. Returns (sums of the (total, count) pairs, the first 0-based step with a
        value that is not finite or -1, seconds)."""
        sums = jax.device_get(self._sums)
        secs = time.perf_counter() - self._start
        self._sums, self.is_first = None, False
        return sums["metrics"], int(sums["first_bad"]), secs


@jax.jit
def _add(sums: dict | None, metrics: dict, step) -> dict:
    """Adds the (total, count) pairs of a step; keeps the first step with a value that is not finite."""
    is_bad = ~jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))).all()
    first_bad = jnp.where(is_bad, step, -1)
    if sums is not None:
        metrics = jax.tree.map(jnp.add, sums["metrics"], metrics)
        first_bad = jnp.where(sums["first_bad"] >= 0, sums["first_bad"], first_bad)
    return {"metrics": metrics, "first_bad": first_bad}
