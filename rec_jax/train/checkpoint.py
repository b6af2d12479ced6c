"""Checkpoints: what a run needs to resume exactly, kept so that no single failure loses it.

    checkpoints/latest/STEP    the newest `keep` states
    checkpoints/best/STEP      states of the best validation scores, the newest two
    checkpoints/damaged/...    checkpoints that could not be read back, set aside by a restore

A state is written once: to `best` if its evaluation was the best so far, else to `latest`. So the
newest checkpoint of both folders is always one consistent snapshot, and `best` can never disagree
with it. `best` keeps two, because the snapshot before the newest one names the best of its time.

Each checkpoint holds the arrays (Orbax, written in the background, renamed into place when
complete) and a JSON record: data position, progress, what the run is, and a checksum of each leaf.
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
    """A checkpoint could not be written (a full disk, mostly); earlier ones are intact."""


class DamagedError(ValueError):
    """A checkpoint cannot be read back: truncated, incomplete or altered."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: arrays placed like the target they were restored into, and the JSON record
    saved with them (step, data, progress, run_info, digests)."""

    state: Any
    record: dict
    path: pathlib.Path


class Saver:
    """Writes checkpoints in the background, at most one at a time. Every method raises SaveError if it fails,
    or if the save before it has failed."""

    def __init__(self, directory, keep: int):
        _silence_orbax()
        self._directory = pathlib.Path(directory).absolute()
        self._pending = -1
        self._managers = {}
        for kind, num_kept in (("best", _NUM_BEST), ("latest", keep)):
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(num_kept),
                save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(1),
                cleanup_tmp_directories=True,  # What a killed process left half-written.
                lightweight_initialize=True,  # A damaged old checkpoint must not stop the run.
            )
            path = self._directory / kind
            with self._errors_explained():
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
        with self._errors_explained():
            self._managers["best" if best else "latest"].save(step, args=args)

    def check(self) -> None:
        """Does not wait for the save in progress."""
        with self._errors_explained():
            for manager in self._managers.values():
                manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until nothing is being written."""
        with self._errors_explained():
            for manager in self._managers.values():
                manager.wait_until_finished()
                manager.check_for_errors()

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        try:
            self.wait()
        finally:
            for manager in self._managers.values():
                with contextlib.suppress(Exception):  # Reported by wait(), which ran first.
                    manager.close()

    @contextlib.contextmanager
    def _errors_explained(self):
        try:
            yield
        except Exception as error:
            cause = "the disk is full" if _is_full_disk(error) else f"{type(error).__name__}: {error}"
            what = f"of step {self._pending}" if self._pending >= 0 else "folder"
            intact = "no checkpoint was written yet: make room and run the same command again"
            if kept := _candidates(self._directory, ("best", "latest")):
                intact = (
                    f"the checkpoint of step {kept[0].name} is intact: make room and run the same command "
                    "again to resume from it"
                )
            raise SaveError(
                f"the checkpoint {what} could not be written to {self._directory}: {cause}; {intact}"
            ) from error


def restore(directory, state, check: Callable[[dict, pathlib.Path], None] | None = None) -> Restored | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    A checkpoint that is truncated, incomplete or altered is named on stderr, moved to `damaged/`,
    and the one before it is used.

    Args:
      state: a pytree of arrays: the structure, shapes, types and placement to restore into.
      check: `(record, path)`, raises ValueError if the run must not resume from what was saved there; called
        before the arrays are read.

    Raises DamagedError if there are checkpoints, but none is whole.
    """
    directory = pathlib.Path(directory).absolute()
    restored, reasons = _newest_whole(_candidates(directory, ("best", "latest")), state, check)
    if restored is None and reasons:
        raise DamagedError(
            f"none of the {len(reasons)} checkpoints in {directory} can be read back: start anew "
            f"with another workdir, or delete {directory} to start anew in this one. "
            + "; ".join(reasons.values())
        )
    for damaged in reasons:
        if processes.is_first():
            _set_aside(damaged, directory)
        processes.wait_for_all()
    if reasons:
        _say(f"falling back to the last good checkpoint, step {restored.record['step']} ({restored.path})")
    return restored


def restore_best(directory, params, max_step: int | None = None) -> Restored | None:
    """The parameters alone of the best validation score, or None where no evaluation was saved.

    A damaged best checkpoint is named on stderr and the best before it is used.

    Args:
      params: a pytree of arrays (or of ShapeDtypeStruct with a sharding) to restore into.
      max_step: checkpoints newer than this are not considered.
    """
    paths = _candidates(pathlib.Path(directory).absolute(), ("best",))
    if max_step is not None:
        paths = [path for path in paths if int(path.name) <= max_step]
    restored, _ = _newest_whole(paths, {"params": params})
    return restored and dataclasses.replace(restored, state=restored.state["params"])


def _newest_whole(paths, target, check=None) -> tuple[Restored | None, dict[pathlib.Path, str]]:
    """(the first of the checkpoints that is whole, why those before it are not, which are also named on
    stderr)."""
    reasons = {}
    for path in paths:
        try:
            return _read(path, target, check), reasons
        except DamagedError as error:
            _say(str(error))
            reasons[path] = str(error)
    return None, reasons


def is_finite(params) -> bool:
    """Whether every float of the parameters is finite; waits for them to be computed."""
    return bool(_all_finite(jax.tree.leaves(params)))


@jax.jit
def _all_finite(leaves: list) -> jax.Array:
    return jnp.array([jnp.isfinite(x).all() for x in leaves]).all()


def _candidates(directory: pathlib.Path, kinds) -> list[pathlib.Path]:
    """Complete checkpoints, newest first; a half-written one still has a temporary name."""
    paths = [path for kind in kinds for path in (directory / kind).glob("*") if path.name.isdigit()]
    # sorted() is stable: of two with one step, the best comes first, as it was evaluated.
    return sorted(paths, key=lambda path: -int(path.name))


def _read(path: pathlib.Path, target, check=None) -> Restored:
    _silence_orbax()
    with _damage_raised(path):
        with _reader() as reader:
            saved = reader.restore(path, ocp.args.Composite(record=ocp.args.JsonRestore())).record
        record = saved["record"]
        if _record_digest(record) != saved["digest"]:
            raise DamagedError("the checksum of its record differs from the one saved")
    if check:
        check(record, path)
    with _damage_raised(path):
        return Restored(_read_state(path, target, record["digests"]), record, path)


def _reader() -> ocp.Checkpointer:
    """Of this process alone: Orbax would wait for one that met damage."""
    alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)


@contextlib.contextmanager
def _damage_raised(path: pathlib.Path):
    """Turns any error into a DamagedError, for damage shows up as any kind of error; in all processes, if one
    meets it."""
    reason = ""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if processes.largest(int(reason != "")):
        raise DamagedError(f"the checkpoint {path} is damaged ({reason or 'another process cannot read it'})")


def _read_state(path: pathlib.Path, target, digests: dict):
    """The arrays of `target` (the whole state, or {"params": ...}), checked leaf by leaf."""
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
            raise DamagedError(f"the checksum of {name} is {digest}, {digests[name]} was saved")
    return state


def _digests(state) -> dict[str, int]:
    """crc32 of the bytes of each leaf, by path (`params/item/table`).

    A leaf that is sharded over several processes has none: no process holds all of its bytes.
    """
    return {
        name: _digest(leaf)
        for name, leaf in leaf_names(state).items()
        if leaf.is_fully_addressable or leaf.is_fully_replicated
    }


def _digest(leaf) -> int:
    """Over the shards in the order of their rows, where they are that: a whole copy of a large table would
    stay in memory as long as the table."""

    def bounds(shard):
        return [dim.indices(size)[:2] for dim, size in zip(shard.index, leaf.shape, strict=True)]

    by_bounds = {str(bounds(shard)): shard for shard in leaf.addressable_shards}  # one of each replica
    shards = sorted(by_bounds.values(), key=bounds)
    is_by_rows = all(bounds(shard)[1:] == [(0, size) for size in leaf.shape[1:]] for shard in shards)
    digest = 0
    for array in [shard.data for shard in shards] if is_by_rows else [leaf]:
        digest = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), digest)
    return digest


def _record_digest(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _set_aside(path: pathlib.Path, directory: pathlib.Path) -> None:
    """Moves a damaged checkpoint out of the way of the run that will write this step again."""
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
    """Keeps from stderr the many tracebacks of one failed save or restore, and the chatter.

    Orbax reads and writes leaves concurrently. On an error each of its threads logs it, and the
    readers or writers of other leaves complain that their event loop is closed. The error itself
    reaches our caller as SaveError or DamagedError. Under absl's app.run Orbax also logs a dozen
    lines a save.
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
