"""Reports of a run: `metrics.jsonl`, TensorBoard, a progress bar and `curves.png`."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time

import tqdm
from matplotlib.figure import Figure
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from rec_jax.train.checkpoint import SaveError


class Monitor:
    """Writes the metrics of a run.

    Every line of `metrics.jsonl` is a JSON object with `step` and `epoch`; lines of training have `train/...`
    keys, and lines of evaluations `val/...` keys. First it removes the lines after the restored step, which
    the run will write again, and an incomplete last line of a killed process.

    total_steps: steps of the whole run, for the estimate of the remaining time. step: the step that the run
    resumes from, 0 for a new run. eval_step: the last step whose evaluation is part of the restored run.
    """

    def __init__(self, workdir, *, total_steps: int, step: int, eval_step: int):
        self._workdir = pathlib.Path(workdir)
        path = self._workdir / "metrics.jsonl"
        with _report_full_disk(self._workdir):
            self._workdir.mkdir(parents=True, exist_ok=True)
            _trim(path, step, eval_step)
            self._file = path.open("a", encoding="utf-8")
            self._board = _Board(self._workdir / "tensorboard", step)
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )

    def advance(self) -> None:
        """Moves the bar by one step; reads nothing from the device."""
        self._bar.update(1)

    def log(self, step: int, epoch: float, metrics: dict) -> None:
        """Appends one line and shows loss and tokens/s on the bar.

        metrics: {prefixed name (`train/loss`, `val/ndcg@10`): JSON-able value}."""
        line = {"step": step, "epoch": round(epoch, 4), **metrics}
        with _report_full_disk(self._workdir):
            self._file.write(json.dumps(_null_if_not_finite(line)) + "\n")
            self._file.flush()
            self._board.write(step, metrics)
        if "train/tokens_per_sec" in metrics:
            rate = f"{metrics['train/tokens_per_sec']:,.0f} tokens/s"
            self._bar.set_postfix_str(f"loss {metrics['train/loss']:.4f}, {rate}", refresh=False)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def history(self) -> list[dict]:
        """Returns all lines of `metrics.jsonl`, including those of earlier sessions."""
        return read_metrics(self._workdir / "metrics.jsonl")

    def plot(self, metric: str) -> None:
        """Draws `curves.png`: the training loss and the validation metric (such as `ndcg@10`) by step."""
        figure, lines = Figure(figsize=(10, 4), layout="constrained"), self.history()
        for panel, name in zip(figure.subplots(1, 2), ("train/loss", f"val/{metric}"), strict=True):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            style = "-" if name == "train/loss" else "o-"
            if points:
                panel.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1)
            panel.set(xlabel="step", title=name)
            panel.grid(alpha=0.3)
        with _report_full_disk(self._workdir):
            figure.savefig(self._workdir / "curves.png", dpi=120)

    def close(self) -> None:
        self._bar.close()
        for file in (self._board, self._file):
            with contextlib.suppress(OSError):  # A full disk has already been reported.
                file.close()


class SilentMonitor:
    """A monitor that writes nothing, for all processes of a run except the first."""

    def __init__(self, workdir, **_):
        self._workdir = pathlib.Path(workdir)

    def _do_nothing(self, *_) -> None: ...

    advance = log = say = plot = close = _do_nothing

    def history(self) -> list[dict]:
        return read_metrics(self._workdir / "metrics.jsonl")


@contextlib.contextmanager
def _report_full_disk(workdir: pathlib.Path):
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"metrics could not be written to {workdir} ({error.strerror}): free some disk space and run the "
            "same command again to resume from the last checkpoint"
        ) from error


class _Board:
    """TensorBoard scalars, written without a thread, because that of SummaryWriter hangs on a full disk."""

    def __init__(self, folder: pathlib.Path, step: int):
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        if step:  # Hides what an earlier session wrote after the step that this one resumes from.
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, metrics: dict) -> None:
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if isinstance(value, int | float)
        ]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._events.write_event(event)
        if time.monotonic() > self._flushed + 5:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


def read_metrics(path) -> list[dict]:
    """Returns the lines of a `metrics.jsonl`, without an incomplete last line."""
    path, lines = pathlib.Path(path), []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def _trim(path: pathlib.Path, step: int, eval_step: int) -> None:
    """Removes the lines that the run will write again; replaces the file atomically."""
    if not path.exists():
        return
    kept = [
        line
        for line in read_metrics(path)
        if line["step"] <= (eval_step if any(name.startswith("val/") for name in line) else step)
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _null_if_not_finite(value):
    """Replaces NaN and infinities by None, because JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _null_if_not_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_null_if_not_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
