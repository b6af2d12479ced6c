"""The training loop: one for every model, read from top to bottom.

Its order is evaluate the current state, save, next batch, step, log. The host runs a few steps
ahead of the device and waits for it only to log: metrics stay (total, count) pairs on the device.
"""

import collections
import contextlib
import dataclasses
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax import processes
from rec_jax.train.checkpoint import DamagedError, Restored, Saver, is_finite, restore, restore_best
from rec_jax.train.monitor import Monitor, SilentMonitor

_WAY_OUT = "Lower the learning rate, clip the gradients, or use f32."
_MAX_STEPS_AHEAD = 4  # Steps that the host may have queued: enough to hide it, bounded in memory.


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    epochs: int = 100
    batch_rows: int = 32  # packed rows per step, over all devices
    micro_rows: int = 4  # rows per device that a step works on at a time
    all_windows: bool = False  # learn from whole histories, not only from their last data.max_len events
    eval_every_epochs: float = 1.0
    patience: int = 10  # evaluations without improvement until the run stops; 0 = never
    metric: str = "ndcg@10"  # of the validation, larger is better
    checkpoint_every_steps: int = 1000  # besides those after every evaluation; 0 = only those
    log_every_steps: int = 50
    keep_checkpoints: int = 2  # the newest ones; the two best are kept apart

    def __post_init__(self):
        for name, least in {
            "epochs": 1,
            "batch_rows": 1,
            "micro_rows": 1,
            "patience": 0,
            "checkpoint_every_steps": 0,
            "log_every_steps": 1,
            "keep_checkpoints": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least} (TrainConfig)")
        if not self.eval_every_epochs > 0:
            raise ValueError(f"eval_every_epochs={self.eval_every_epochs} must be positive (TrainConfig)")


@dataclasses.dataclass
class Progress:
    """What a resumed run must know besides the state and the data position; saved as JSON."""

    eval_step: int = 0  # of the last evaluation
    best_step: int = 0  # 0 = no evaluation yet
    best_value: float = 0.0
    num_bad_evals: int = 0  # evaluations since the best one
    tokens: float = 0.0  # those of the timed steps only: all but the first of a session
    train_secs: float = 0.0  # of the timed steps
    compile_secs: float = 0.0  # first steps, which compile
    eval_secs: float = 0.0

    def add_window(self, window: dict, secs: float, *, is_compiling: bool) -> None:
        """Counts the time and the real tokens of the steps since the last log."""
        if is_compiling:
            self.compile_secs += secs
        else:
            self.train_secs += secs
            self.tokens += float(window["metrics"]["tokens"][0])

    def add_evaluation(self, step: int, value: float) -> bool:
        """Counts an evaluation; returns whether it is the best so far."""
        self.eval_step = step
        is_best = self.best_step == 0 or value > self.best_value
        if is_best:
            self.best_step, self.best_value, self.num_bad_evals = step, value, 0
        else:
            self.num_bad_evals += 1
        return is_best


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The outcome of `fit`.

    Attributes:
      state: the state after the last step.
      best_params: the parameters with the best validation metric.
      best_step, best_value: where and what that metric was.
      steps: steps taken over all sessions of the run.
      stopped_by: `epochs` or `patience`.
      train_secs: seconds of training steps over all sessions, without the first step of each
        session (it compiles), evaluations and saves.
      compile_secs, eval_secs: seconds of those first steps and of the evaluations.
      tokens_per_sec: real tokens (`metrics["tokens"]`) per second of `train_secs`.
      history: the lines of `metrics.jsonl`.
    """

    state: Any
    best_params: Any
    best_step: int
    best_value: float
    steps: int
    stopped_by: str
    train_secs: float
    compile_secs: float
    eval_secs: float
    tokens_per_sec: float
    history: list[dict]


def fit(
    state,
    step_fn: Callable,
    batches,
    evaluate_fn: Callable[[Any], dict],
    *,
    config: TrainConfig,
    steps_per_epoch: int,
    workdir,
    run_info: dict,
    place: Callable[[Any], Any] = jax.device_put,
    describe_batch: Callable[[int], str] | None = None,
    before_eval: Callable[[Any], Any] | None = None,
    eval_from: float = 0.0,
    on_best: Callable[[Any, dict], None] | None = None,
) -> FitResult:
    """Trains until the last epoch or until validation stops improving; resumes what it finds.

    On SIGTERM (or one Ctrl-C) it finishes the step, saves and raises SystemExit, with code 0 (130). If one
    of several processes is told to stop, all do, after the next step that is logged.

    Args:
      state: a registered dataclass with `step` (int32 scalar) and `params`; donated.
      step_fn: `(state, batch) -> (state, metrics)`, jitted; metrics map a name to a pair of device
        scalars (total, count) and include `loss` and `tokens` (real tokens as the total).
      batches: a grain DatasetIterator over the batches of all epochs.
      evaluate_fn: maps `params` to validation metrics, `config.metric` among them.
      steps_per_epoch: batches in an epoch.
      workdir: takes `metrics.jsonl`, `tensorboard/`, `checkpoints/` and `curves.png`.
      run_info: what the run is (config, split checksum), JSON-able; a resumed run must agree.
      place: puts a host batch on the devices.
      before_eval: maps the state, which it consumes, to one whose parameters can be evaluated and saved.
      eval_from: share of the run before which nothing is evaluated, and so cannot be the best.
      describe_batch: tells what the batch of a 0-based step holds, for the message of a NaN.
      on_best: `(params, record)`, called after each evaluation that is the best so far, once its checkpoint
        is on the disk, and once more for the best of the run before `fit` returns (also where no step was
        left to take), in case a killed session could not. `record["step"]` is the step of that
        evaluation. The next step donates `params`: copy what must outlive the call. All processes call it.

    Raises:
      ValueError: the workdir holds another run, or only damaged checkpoints; no such metric.
      FloatingPointError: the loss or the parameters became NaN or infinite.
      SaveError: a checkpoint could not be written.
    """
    workdir = pathlib.Path(workdir)
    folder = workdir / "checkpoints"
    schedule = _Schedule(config, steps_per_epoch, eval_from)

    # Restore.
    progress, saved_step = Progress(), 0
    restored = restore(folder, state, run_info)
    if restored:
        state, record = restored.state, restored.record
        batches.set_state(record["data"])
        progress, saved_step = Progress(**record["progress"]), record["step"]
    step = int(state.step)
    make_monitor = Monitor if processes.is_first() else SilentMonitor
    monitor = make_monitor(workdir, total_steps=schedule.total, step=step, eval_step=progress.eval_step)

    with contextlib.ExitStack() as stack:
        stack.callback(monitor.close)
        if restored:
            monitor.say(f"resumed from step {step} ({restored.path})")
            _check_best(folder, state.params, step, progress, monitor)
        saver = Saver(folder, config.keep_checkpoints)
        stack.callback(saver.close)
        stop = stack.enter_context(_StopSignal())
        sums, stopping, is_first = None, None, True
        in_flight = collections.deque()
        while True:
            # Evaluate the current state.
            is_best = False
            if schedule.evaluates(step) and progress.eval_step != step and not stopping:
                start = time.perf_counter()
                state = before_eval(state) if before_eval else state
                metrics = evaluate_fn(state.params)
                progress.eval_secs += time.perf_counter() - start
                value = processes.of_first(_pick(metrics, config.metric))
                is_best = progress.add_evaluation(step, value)
                monitor.log(step, step / steps_per_epoch, _under("val", metrics))
                monitor.say(_evaluation_text(step, steps_per_epoch, config.metric, value, progress))
            stopped_by = schedule.stopped_by(step, progress)

            # Save the state and the data position. An evaluation that is the best goes to `best`.
            is_due = stopping or schedule.saves(step)
            if step > 0 and (is_best or (is_due and saved_step != step)):
                _check_params(state.params, step)
                record = {
                    "step": step,
                    "data": batches.get_state(),
                    "progress": dataclasses.asdict(progress),
                    "run_info": run_info,
                }
                saver.save(state, record, best=is_best)
                saved_step = step
                if is_best and on_best:
                    saver.wait()  # What is made of the best is never newer than a readable checkpoint.
                    on_best(state.params, record)
            if stopped_by or stopping:
                break

            # Take the next batch and a step. The host runs ahead of the device, but not far.
            if sums is None:
                start = time.perf_counter()
            state, metrics = step_fn(state, place(_next(batches, step, schedule.total)))
            sums = _start(metrics, step) if sums is None else _add(sums, metrics, step)
            step += 1
            in_flight.append(sums["first_bad"])
            if len(in_flight) > _MAX_STEPS_AHEAD:
                in_flight.popleft().block_until_ready()
            monitor.advance()
            is_logged = is_first or schedule.logs(step)
            stopping = stop.agreed(is_logged)

            # Log, and always before an evaluation or a save, so that these see finite numbers.
            if is_logged or stopping:
                window = jax.device_get(sums)
                secs = time.perf_counter() - start
                _check_finite(window, steps_per_epoch, saved_step, describe_batch)
                progress.add_window(window, secs, is_compiling=is_first)
                monitor.log(step, step / steps_per_epoch, _train_metrics(window, secs, is_first))
                saver.check()
                sums, is_first = None, False

        saver.wait()
        monitor.plot(config.metric)
        if stopping and not stopped_by:
            monitor.say(f"{stopping.name}: stopped and saved at step {step}; run again to go on")
            raise SystemExit(0 if stopping == signal.SIGTERM else 130)
        best = _best(folder, state.params)
        if on_best:
            on_best(best.state, best.record)
        result = _result(state, step, stopped_by, progress, best, monitor.history())
        monitor.say(
            f"{'already ' if is_first else ''}finished at step {step} ({stopped_by}); best "
            f"{config.metric} {result.best_value:.4f} at step {result.best_step}"
        )
        return result


def _best(folder, params) -> Restored:
    best = restore_best(folder, params)
    if best is None:
        raise DamagedError(
            f"no best checkpoint in {folder / 'best'} can be read back; run the same command "
            "again to evaluate and save the last state"
        )
    return best


def _result(state, step: int, stopped_by: str, progress: Progress, best: Restored, history) -> FitResult:
    return FitResult(
        state=state,
        best_params=best.state,
        best_step=best.record["progress"]["best_step"],
        best_value=best.record["progress"]["best_value"],
        steps=step,
        stopped_by=stopped_by,
        train_secs=progress.train_secs,
        compile_secs=progress.compile_secs,
        eval_secs=progress.eval_secs,
        tokens_per_sec=progress.tokens / max(progress.train_secs, 1e-9),
        history=history,
    )


class _Schedule:
    """What is due after which step."""

    def __init__(self, config: TrainConfig, steps_per_epoch: int, eval_from: float):
        self.total = config.epochs * steps_per_epoch
        self._eval_from = math.ceil(eval_from * self.total)
        self._eval_every = max(1, round(config.eval_every_epochs * steps_per_epoch))
        self._save_every = config.checkpoint_every_steps
        self._log_every = config.log_every_steps
        self._patience = config.patience

    def evaluates(self, step: int) -> bool:
        is_due = step > self._eval_from and step % self._eval_every == 0
        return step > 0 and (is_due or step >= self.total)

    def saves(self, step: int) -> bool:
        is_due = self._save_every > 0 and step % self._save_every == 0
        return is_due or self.evaluates(step)

    def logs(self, step: int) -> bool:
        return step % self._log_every == 0 or self.saves(step)

    def stopped_by(self, step: int, progress: Progress) -> str:
        """Why the run is at its end, or an empty string."""
        if 0 < self._patience <= progress.num_bad_evals:
            return "patience"
        return "epochs" if step >= self.total else ""


class _StopSignal:
    """Takes the first SIGTERM or Ctrl-C as a wish to stop after the step; a second one kills."""

    caught: signal.Signals | None = None

    def agreed(self, is_logged: bool) -> signal.Signals | None:
        """What this process has caught, or any of several: these ask each other after logged steps only."""
        if jax.process_count() == 1:
            return self.caught
        number = processes.largest(self.caught or 0) if is_logged else 0
        return signal.Signals(number) if number else None

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Others cannot set handlers.
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        self.caught = signal.Signals(number)
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *error):
        self._restore()


@jax.jit
def _start(metrics: dict, step) -> dict:
    is_bad = ~jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))).all()
    return {"metrics": metrics, "first_bad": jnp.where(is_bad, step, -1)}


@jax.jit
def _add(sums: dict, metrics: dict, step) -> dict:
    """Adds the (total, count) pairs of a step; keeps the first step with a value not finite."""
    new = _start(metrics, step)
    return {
        "metrics": jax.tree.map(jnp.add, sums["metrics"], metrics),
        "first_bad": jnp.where(sums["first_bad"] >= 0, sums["first_bad"], new["first_bad"]),
    }


def _train_metrics(window: dict, secs: float, is_compiling: bool) -> dict:
    values = {
        name: float(total) / max(float(count), 1e-9) for name, (total, count) in window["metrics"].items()
    }
    if not is_compiling:
        values["tokens_per_sec"] = float(window["metrics"]["tokens"][0]) / secs
    return _under("train", values)


def _check_params(params, step: int) -> None:
    if not is_finite(params):
        raise FloatingPointError(
            f"the parameters are not finite after step {step}, though its loss is; they were not "
            f"saved. {_WAY_OUT}"
        )


def _check_finite(window: dict, steps_per_epoch: int, saved_step: int, describe_batch) -> None:
    bad = int(window["first_bad"])
    if bad < 0:
        return
    names = [n for n, pair in window["metrics"].items() if not all(math.isfinite(x) for x in pair)]
    holds = f", holding {describe_batch(bad)}" if describe_batch else ""
    raise FloatingPointError(
        f"{' and '.join(names)} became NaN or infinite at step {bad + 1}: epoch "
        f"{bad // steps_per_epoch + 1}, batch {bad % steps_per_epoch + 1} of {steps_per_epoch}"
        f"{holds}. The last saved step is {saved_step}. {_WAY_OUT}"
    )


def _check_best(folder, params, step: int, progress: Progress, monitor: Monitor) -> None:
    """Makes `progress` agree with the best checkpoint that is there, should the best be damaged."""
    best = restore_best(folder, params, max_step=step)
    if best is None:
        if progress.best_step:
            monitor.say(
                f"the best checkpoint (step {progress.best_step}) is lost: the next evaluation "
                "counts as the best"
            )
            # An evaluation of this very step, if it is due, is done again.
            progress.eval_step = progress.best_step = progress.num_bad_evals = 0
        return
    found = best.record["progress"]
    if found["best_step"] != progress.best_step:
        monitor.say(
            f"the best checkpoint (step {progress.best_step}) is lost: the best is now that of "
            f"step {found['best_step']} ({found['best_value']:.4f})"
        )
        progress.best_step, progress.best_value = found["best_step"], found["best_value"]


def _next(batches, step: int, total_steps: int):
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"the data ended at step {step} of {total_steps}: the iterator must give the batches "
            "of all epochs"
        ) from None


def _pick(metrics: dict, name: str) -> float:
    if name not in metrics:
        raise ValueError(
            f"metric={name!r} is not among the validation metrics: {', '.join(metrics)} (TrainConfig)"
        )
    value = float(metrics[name])
    if not math.isfinite(value):
        raise FloatingPointError(f"the validation metric {name} is {value}. {_WAY_OUT}")
    return value


def _under(part: str, metrics: dict) -> dict:
    return {f"{part}/{name}": value for name, value in metrics.items()}


def _evaluation_text(step: int, steps_per_epoch: int, metric: str, value: float, progress: Progress) -> str:
    verdict = (
        "best so far"
        if progress.best_step == step
        else f"best {progress.best_value:.4f} at step {progress.best_step}"
    )
    return f"epoch {step / steps_per_epoch:g}, step {step}: val/{metric} {value:.4f} ({verdict})"
