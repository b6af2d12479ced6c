"""The training loop: one for every model, read from top to bottom.

Its order is evaluate the current state, save, next batch, step, log. The host runs a few steps
ahead of the device and waits for it only to log: metrics stay (total, count) pairs on the device.
"""

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

from rec_jax import processes
from rec_jax.train.checkpoint import DamagedError, Saver, is_finite, restore, restore_best
from rec_jax.train.monitor import Monitor, SilentMonitor
from rec_jax.train.same_run import changes, check_same_run
from rec_jax.train.schedule import Progress, Schedule, TrainConfig
from rec_jax.train.window import Window

_WAY_OUT = "Lower the learning rate, clip the gradients, or use f32."


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The batches of all epochs, and how they reach the devices."""

    batches: Any  # a grain DatasetIterator over host batches
    steps_per_epoch: int
    place: Callable[[Any], Any] = jax.device_put  # puts a host batch on the devices
    describe: Callable[[int], str] | None = None  # what the batch of a 0-based step holds, for messages


@dataclasses.dataclass(frozen=True)
class Validation:
    """What picks the best parameters."""

    evaluate: Callable[[Any], dict]  # parameters -> metrics, TrainConfig.metric among them
    prepare: Callable[[Any], Any] | None = None  # state, consumed -> one that can be evaluated and saved
    begin: float = 0.0  # share of the run before which nothing is evaluated, and so cannot be the best


@dataclasses.dataclass(frozen=True)
class FitResult:
    state: Any  # after the last step
    best_params: Any  # those with the best validation metric
    best_step: int
    best_value: float  # of the metric
    steps: int  # over all sessions of the run
    stopped_by: str  # "epochs" or "patience"
    progress: Progress  # seconds and tokens over all sessions
    history: list[dict]  # the lines of metrics.jsonl


def fit(
    state,
    step_fn: Callable,
    data: TrainingData,
    validation: Validation,
    *,
    config: TrainConfig,
    workdir,
    run_info: dict,
    learning_rate: Callable[[int], float],
    on_best: Callable[[Any, dict], None] | None = None,
) -> FitResult:
    """Trains until the last epoch or until validation stops improving; resumes what it finds.

    On SIGTERM (or one Ctrl-C) it finishes the step, saves and raises SystemExit, with code 0 (130). If one
    of several processes is told to stop, all do, after the next step that is logged.

    Args:
      state: a registered dataclass with `step` (int32 scalar) and `params`; donated.
      step_fn: `(state, batch) -> (state, metrics)`, jitted; metrics map a name to a pair of device
        scalars (total, count) and include `loss` and `tokens` (real tokens as the total).
      workdir: takes `metrics.jsonl`, `tensorboard/`, `checkpoints/` and `curves.png`.
      run_info: what the run is (config, split checksum), JSON-able; `check_same_run` says how a resumed run
        may differ.
      learning_rate: maps a 0-based step to its rate, for the log: a line has that of its last step.
      on_best: `(params, record)`, called by all processes after each evaluation that is the best so far, once
        its checkpoint is on the disk, and again for the best of the run before `fit` returns, in case a
        killed session could not. `record["step"]` is the step of that evaluation. The next step donates
        `params`: copy what must outlive the call.

    Raises:
      ValueError: the workdir holds another run, or only damaged checkpoints; no such metric.
      FloatingPointError: the loss or the parameters became NaN or infinite.
      SaveError: a checkpoint could not be written.
    """
    with contextlib.ExitStack() as stack:
        session = _Session(pathlib.Path(workdir), config, data, validation, run_info)
        state = session.resume(state, stack)
        schedule, progress = session.schedule, session.progress
        stop = stack.enter_context(_StopSignal())
        window, step, stopping = Window(), session.saved_step, None
        while True:
            # Evaluate the current state.
            is_best = False
            if schedule.evaluates(step) and progress.eval_step != step and not stopping:
                state, is_best = session.evaluate(state, step)
            stopped_by = schedule.stopped_by(step, progress)

            # Save the state and the data position.
            is_due = session.saved_step != step and (stopping or schedule.saves(step))
            if step > 0 and (is_best or is_due):
                record = session.save(state, step, is_best)
                if is_best and on_best:
                    session.saver.wait()  # What is made of the best is never newer than its checkpoint.
                    on_best(state.params, record)
            if stopped_by or stopping:
                break

            # Take the next batch and a step.
            window.open()
            state, metrics = step_fn(state, data.place(session.next_batch(step)))
            window.add(metrics, step)
            step += 1
            session.monitor.advance()

            # Log, and always before an evaluation or a save, so that these see finite numbers.
            is_logged = window.is_first or schedule.logs(step)
            stopping = stop.agreed(is_logged)
            if is_logged or stopping:
                session.log(window, step, learning_rate)
        session.saver.wait()
        if stopping:  # The last step, too, is evaluated by the next session.
            session.monitor.say(f"{stopping.name}: stopped and saved at step {step}; run again to resume")
            raise SystemExit(0 if stopping == signal.SIGTERM else 130)
        result = session.result(state, step, stopped_by, on_best)
        session.monitor.say(
            f"{'already ' if window.is_first else ''}finished at step {step} ({stopped_by}); best "
            f"{config.metric} {result.best_value:.4f} at step {result.best_step}"
        )
        return result


class _Session:
    """One session of a run: how far the run is, and the files that it reads and writes."""

    def __init__(
        self,
        workdir: pathlib.Path,
        config: TrainConfig,
        data: TrainingData,
        validation: Validation,
        run_info: dict,
    ):
        self._workdir, self._config, self._data, self._validation = workdir, config, data, validation
        self._folder, self._run_info = workdir / "checkpoints", run_info
        self.schedule = Schedule(config, data.steps_per_epoch, validation.begin)
        self.progress, self.saved_step = Progress(), 0

    def resume(self, state, stack: contextlib.ExitStack):
        """The state to start from: the newest that is saved, or the given one. `stack` closes the files."""
        restored = restore(self._folder, state, self._check)
        if restored:
            state, record = restored.state, restored.record
            self._data.batches.set_state(record["data"])
            self.progress, self.saved_step = Progress(**record["progress"]), record["step"]
        self.monitor = (Monitor if processes.is_first() else SilentMonitor)(
            self._workdir,
            total_steps=self.schedule.total,
            step=self.saved_step,
            eval_step=self.progress.eval_step,
        )
        stack.callback(self.monitor.close)
        if restored:
            self.monitor.say(f"resumed from step {self.saved_step} ({restored.path})")
            for key, values in changes(restored.record["run_info"], self._run_info).items():
                self.monitor.say(f"changed since then: {key} ({values})")
            self._check_best(state.params)
        self.saver = Saver(self._folder, self._config.keep_checkpoints)
        stack.callback(self.saver.close)
        return state

    def _check(self, record: dict, path: pathlib.Path) -> None:
        is_finished = self.schedule.is_finished(record["step"], Progress(**record["progress"]))
        check_same_run(record["run_info"], self._run_info, path, is_finished=is_finished)

    def _check_best(self, params) -> None:
        """Makes `progress` agree with the best checkpoint that is there, should the best be damaged."""
        progress = self.progress
        best = restore_best(self._folder, params, max_step=self.saved_step)
        found = best.record["progress"] if best else {"best_step": 0, "best_value": 0.0}
        if found["best_step"] == progress.best_step:
            return
        now = f"the best is now that of step {found['best_step']} ({found['best_value']:.4f})"
        if best is None:
            now = "the next evaluation counts as the best"
            # An evaluation of this very step, if it is due, is done again.
            progress.eval_step = progress.num_bad_evals = 0
        self.monitor.say(f"the best checkpoint (step {progress.best_step}) is lost: {now}")
        progress.best_step, progress.best_value = found["best_step"], found["best_value"]

    def evaluate(self, state, step: int) -> tuple[Any, bool]:
        """Evaluates and logs; returns the state and whether this evaluation is the best so far."""
        name, epoch, start = self._config.metric, step / self._data.steps_per_epoch, time.perf_counter()
        state = self._validation.prepare(state) if self._validation.prepare else state
        metrics = self._validation.evaluate(state.params)
        self.progress.eval_secs += time.perf_counter() - start
        value = processes.of_first(_pick(metrics, name))
        is_best = self.progress.add_evaluation(step, value)
        self.monitor.log(step, epoch, {f"val/{name}": value for name, value in metrics.items()})
        best = f"best {self.progress.best_value:.4f} at step {self.progress.best_step}"
        self.monitor.say(
            f"epoch {epoch:g}, step {step}: val/{name} {value:.4f} ({'best so far' if is_best else best})"
        )
        return state, is_best

    def save(self, state, step: int, is_best: bool) -> dict:
        """Starts to save the state, in `best` if its evaluation is; returns the record beside it."""
        if not is_finite(state.params):
            raise FloatingPointError(
                f"the parameters are not finite after step {step}, though its loss is; they were not "
                f"saved. {_WAY_OUT}"
            )
        record = {
            "step": step,
            "data": self._data.batches.get_state(),
            "progress": dataclasses.asdict(self.progress),
            "run_info": self._run_info,
        }
        self.saver.save(state, record, best=is_best)
        self.saved_step = step
        return record

    def next_batch(self, step: int):
        batch = next(self._data.batches, None)
        if batch is None:
            raise ValueError(
                f"the data ended at step {step} of {self.schedule.total}: the iterator must give the batches "
                "of all epochs"
            )
        return batch

    def log(self, window: Window, step: int, learning_rate: Callable[[int], float]) -> None:
        """Waits for the steps of the window and logs them.

        Raises FloatingPointError if a metric of one is not finite, SaveError if a save has failed meanwhile.
        """
        is_compiling = window.is_first
        metrics, first_bad, secs = window.close()
        if first_bad >= 0:
            raise FloatingPointError(self._not_finite_text(metrics, first_bad))
        tokens = float(metrics["tokens"][0])
        self.progress.add_steps(tokens, secs, is_compiling=is_compiling)
        values = {name: float(total) / max(float(count), 1e-9) for name, (total, count) in metrics.items()}
        values["learning_rate"] = float(learning_rate(step - 1))
        if not is_compiling:
            values["tokens_per_sec"] = tokens / secs
        epoch = step / self._data.steps_per_epoch
        self.monitor.log(step, epoch, {f"train/{name}": value for name, value in values.items()})
        self.saver.check()

    def _not_finite_text(self, metrics: dict, step: int) -> str:
        names = [name for name, pair in metrics.items() if not all(math.isfinite(x) for x in pair)]
        epoch, batch = divmod(step, self._data.steps_per_epoch)
        holds = f", holding {self._data.describe(step)}" if self._data.describe else ""
        return (
            f"{' and '.join(names)} became NaN or infinite at step {step + 1}: epoch {epoch + 1}, batch "
            f"{batch + 1} of {self._data.steps_per_epoch}{holds}. The last saved step is {self.saved_step}. "
            f"{_WAY_OUT}"
        )

    def result(self, state, step: int, stopped_by: str, on_best) -> FitResult:
        self.monitor.plot(self._config.metric)
        best = restore_best(self._folder, state.params)
        if best is None:
            raise DamagedError(
                f"no best checkpoint in {self._folder / 'best'} can be read back; run the same command "
                "again to evaluate and save the last state"
            )
        if on_best:
            on_best(best.state, best.record)
        return FitResult(
            state=state,
            best_params=best.state,
            best_step=best.record["progress"]["best_step"],
            best_value=best.record["progress"]["best_value"],
            steps=step,
            stopped_by=stopped_by,
            progress=self.progress,
            history=self.monitor.history(),
        )


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


def _pick(metrics: dict, name: str) -> float:
    if name not in metrics:
        raise ValueError(
            f"metric={name!r} is not among the validation metrics: {', '.join(metrics)} (TrainConfig)"
        )
    value = float(metrics[name])
    if not math.isfinite(value):
        raise FloatingPointError(f"the validation metric {name} is {value}. {_WAY_OUT}")
    return value
