"""Checkpoints: everything a run needs to resume exactly, stored so that no single failure loses it.

    checkpoints/latest/STEP    the newest `keep` states
    checkpoints/best/STEP      the newest two states that were the best so far
    checkpoints/damaged/...    checkpoints that could not be read, moved here by a restore

A state is written once: to `best` if its evaluation was the best so far, else to `latest`. The newest
checkpoint of both folders is therefore always one consistent snapshot, and `best` cannot disagree with it.
`best` keeps two states, so that the snapshot before the newest one still finds the best state of its time.

Each checkpoint holds the arrays (written by Orbax in the background, renamed into place when complete) and
a JSON record: data position, progress, run_info (config and split checksum), and a checksum of each leaf.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import pathlib
import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rec_jax import processes
from rec_jax.train.same_run import plain_json
from rec_jax.tree import leaf_names

_NUM_BEST = 2
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_DISK_TEXTS = ("No space left", "File too large", "quota exceeded", "RESOURCE_EXHAUSTED")


class SaveError(OSError):
    """A checkpoint could not be written, usually because the disk is full; earlier ones are intact."""


class DamagedError(ValueError):
    """A checkpoint cannot be read: it is truncated, incomplete or altered."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint: arrays with the sharding of the arrays they were restored into, and the JSON
    record saved with them (step, data, progress, run_info, digests)."""

    state: Any
    record: dict
    path: pathlib.Path


class Saver:
    """Writes checkpoints in the background, one at a time. Every method raises SaveError if it fails, or if
    the previous save has failed."""

    def __init__(self, directory, keep: int):
        _silence_orbax()
        self._directory = pathlib.Path(directory).absolute()
        self._pending = -1
        self._managers = {}
        for kind, num_kept in (("best", _NUM_BEST), ("latest", keep)):
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(num_kept),
                save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,  # Incomplete checkpoints of a killed process.
                lightweight_initialize=True,  # A damaged old checkpoint must not stop the run.
            )
            path = self._directory / kind
            with self._explain_errors():
                path.mkdir(parents=True, exist_ok=True)
                self._managers[kind] = ocp.CheckpointManager(path, options=options)

    def save(self, state, record: dict, *, best: bool) -> None:
        """Starts writing `state` under record["step"]; returns once it may be donated to the next step."""
        self.wait()
        self._pending = step = record["step"]
        record = plain_json({"digests": _digests(state), **record})
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            record=ocp.args.JsonSave({"record": record, "digest": _record_digest(record)}),
        )
        with self._explain_errors():
            self._managers["best" if best else "latest"].save(step, args=args)

    def check(self) -> None:
        """Raises if a save has failed; does not wait for the save in progress."""
        with self._explain_errors():
            for manager in self._managers.values():
                manager.check_for_errors()

    def wait(self) -> None:
        """Waits for the save in progress."""
        with self._explain_errors():
            for manager in self._managers.values():
                manager.wait_until_finished()
                manager.check_for_errors()

    def close(self) -> None:
        """Waits for the save in progress and frees the threads."""
        try:
            self.wait()
        finally:
            for manager in self._managers.values():
                with contextlib.suppress(Exception):  # wait() has already reported it.
                    manager.close()

    @contextlib.contextmanager
    def _explain_errors(self):
        try:
            yield
        except Exception as error:
            cause = "the disk is full" if _is_full_disk(error) else f"{type(error).__name__}: {error}"
            what = f"of step {self._pending}" if self._pending >= 0 else "folder"
            advice = "no checkpoint was written yet: free some disk space and run the same command again"
            if kept := _candidates(self._directory, ("best", "latest")):
                advice = (
                    f"the checkpoint of step {kept[0].name} is intact: free some disk space and run the same "
                    "command again to resume from it"
                )
            raise SaveError(
                f"the checkpoint {what} could not be written to {self._directory}: {cause}; {advice}"
            ) from error


def restore(directory, state, check: Callable[[dict, pathlib.Path], None] | None = None) -> Restored | None:
    """Restores the newest intact checkpoint; None if there are no checkpoints.

    A checkpoint that is truncated, incomplete or altered is reported on stderr and moved to `damaged/`; the
    previous one is then used.

    Args:
      state: a pytree of arrays: the structure, shapes, dtypes and shardings to restore into.
      check: called as `check(record, path)` before the arrays are read; raises ValueError if the run must not
        resume from this checkpoint.

    Raises DamagedError if there are checkpoints, but none is intact.
    """
    directory = pathlib.Path(directory).absolute()
    restored, reasons = _newest_intact(_candidates(directory, ("best", "latest")), state, check)
    if restored is None and reasons:
        raise DamagedError(
            f"none of the {len(reasons)} checkpoints in {directory} can be read: start over in another "
            f"workdir, or delete {directory} to start over in this one. " + "; ".join(reasons.values())
        )
    for damaged in reasons:
        if processes.is_first():
            _set_aside(damaged, directory)
        processes.wait_for_all()
    if reasons:
        _say(f"falling back to the last good checkpoint, step {restored.record['step']} ({restored.path})")
    return restored


def restore_best(directory, params, max_step: int | None = None) -> Restored | None:
    """Restores only the parameters with the best validation score; None if there are none.

    A damaged best checkpoint is reported on stderr, and the best one before it is used.

    Args:
      params: a pytree of arrays (or of ShapeDtypeStruct with a sharding) to restore into.
      max_step: later checkpoints are ignored.
    """
    paths = _candidates(pathlib.Path(directory).absolute(), ("best",))
    if max_step is not None:
        paths = [path for path in paths if int(path.name) <= max_step]
    restored, _ = _newest_intact(paths, {"params": params})
    return restored and dataclasses.replace(restored, state=restored.state["params"])


def _newest_intact(paths, target, check=None) -> tuple[Restored | None, dict[pathlib.Path, str]]:
    """Returns (the first intact checkpoint of `paths` or None, {damaged path before it: reason}). Reports
    damage on stderr."""
    reasons = {}
    for path in paths:
        try:
            return _read(path, target, check), reasons
        except DamagedError as error:
            _say(str(error))
            reasons[path] = str(error)
    return None, reasons


def is_finite(params) -> bool:
    """Whether all parameters are finite; waits until they are computed."""
    return bool(_all_finite(jax.tree.leaves(params)))


@jax.jit
def _all_finite(leaves: list) -> jax.Array:
    return jnp.array([jnp.isfinite(x).all() for x in leaves]).all()


def _candidates(directory: pathlib.Path, kinds) -> list[pathlib.Path]:
    """Complete checkpoints, newest first; an incomplete one still has a temporary name."""
    paths = [path for kind in kinds for path in (directory / kind).glob("*") if path.name.isdigit()]
    # sorted() is stable: of two with the same step, the one in `best`, which has been evaluated, is first.
    return sorted(paths, key=lambda path: -int(path.name))


def _read(path: pathlib.Path, target, check=None) -> Restored:
    _silence_orbax()
    with _raise_damage(path):
        with _reader() as reader:
            saved = reader.restore(path, ocp.args.Composite(record=ocp.args.JsonRestore())).record
        record = saved["record"]
        if _record_digest(record) != saved["digest"]:
            raise DamagedError("the checksum of its record differs from the saved one")
    if check:
        check(record, path)
    with _raise_damage(path):
        return Restored(_read_state(path, target, record["digests"]), record, path)


def _reader() -> ocp.Checkpointer:
    """A reader for this process only; otherwise Orbax would wait for a process that found damage."""
    options = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=options)


@contextlib.contextmanager
def _raise_damage(path: pathlib.Path):
    """Turns any error into a DamagedError, because damage can cause any kind of error. All processes raise it
    if one of them has an error."""
    reason = ""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if processes.largest(int(reason != "")):
        raise DamagedError(f"the checkpoint {path} is damaged ({reason or 'another process cannot read it'})")


def _read_state(path: pathlib.Path, target, digests: dict):
    """Reads the arrays of `target` (the whole state, or {"params": ...}) and verifies their checksums."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
    args = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=isinstance(target, dict),
    )
    with _reader() as reader:
        state = reader.restore(path, ocp.args.Composite(state=args)).state
    for name, digest in _digests(state).items():
        if digests.get(name, digest) != digest:
            raise DamagedError(f"the checksum of {name} is {digest}, but {digests[name]} was saved")
    return state


def _digests(state) -> dict[str, int]:
    """crc32 of the bytes of each leaf, by path (`params/item/table`).

    A leaf that is sharded over several processes has no checksum, because no process holds all of its bytes.
    """
    return {
        name: _digest(leaf)
        for name, leaf in leaf_names(state).items()
        if leaf.is_fully_addressable or leaf.is_fully_replicated
    }


def _digest(leaf) -> int:
    """crc32 of a leaf. If it is sharded along its first dim only, its shards are read one by one in order:
    JAX would keep a copy of the whole array in memory as long as the array exists."""

    def bounds(shard):
        return [dim.indices(size)[:2] for dim, size in zip(shard.index, leaf.shape, strict=True)]

    by_bounds = {str(bounds(shard)): shard for shard in leaf.addressable_shards}  # drops replicas
    shards = sorted(by_bounds.values(), key=bounds)
    is_along_first_dim = all(bounds(shard)[1:] == [(0, size) for size in leaf.shape[1:]] for shard in shards)
    digest = 0
    for array in [shard.data for shard in shards] if is_along_first_dim else [leaf]:
        digest = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), digest)
    return digest


def _record_digest(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _set_aside(path: pathlib.Path, directory: pathlib.Path) -> None:
    """Moves a damaged checkpoint to `damaged/`, so that the run can write this step again."""
    folder = directory / "damaged"
    folder.mkdir(exist_ok=True)
    stem = f"{path.parent.name}-{path.name}"
    num_before = len(list(folder.glob(f"{stem}*")))
    target = folder / (f"{stem}-{num_before}" if num_before else stem)
    path.rename(target)
    _say(f"moved {path} to {target}")


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        is_full = isinstance(error, OSError) and error.errno in _FULL_DISK
        if is_full or any(text in str(error) for text in _FULL_DISK_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


@functools.cache
def _silence_orbax() -> None:
    """Hides Orbax's messages and its many tracebacks of one failed save or restore from stderr.

    Orbax reads and writes leaves concurrently. On an error, each of its threads logs the error, and the
    readers or writers of other leaves log that their event loop is closed. The caller receives the error
    itself as a SaveError or DamagedError. Under absl's app.run, Orbax also logs a dozen lines per save.
    """

    def is_worth_logging(record: logging.LogRecord) -> bool:
        is_orbax = "orbax" in pathlib.Path(record.pathname).parts or "orbax" in record.getMessage()
        return not (is_orbax and (record.exc_info or record.levelno < logging.WARNING))

    def hook(unraisable, before=sys.unraisablehook):
        code = getattr(unraisable.object, "cr_code", None)
        is_orbax = code is not None and "orbax" in pathlib.Path(code.co_filename).parts
        if not (is_orbax or str(unraisable.exc_value) == "Event loop is closed"):
            before(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_worth_logging)
    sys.unraisablehook = hook


def _say(text: str) -> None:
    print(f"checkpoint: {text}", file=sys.stderr, flush=True)
