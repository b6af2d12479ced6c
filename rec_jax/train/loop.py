"""The training loop, the same for every model.

Each iteration evaluates the current state, saves it, takes the next batch, runs a step, and logs; evaluation,
saving and logging only when they are due. The host runs a few steps ahead of the device: metrics stay on the
device as (total, count) pairs until they are logged.
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

_ADVICE = "Lower the learning rate, clip the gradients, or use f32."


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The batches of all epochs, and the function that places them on the devices."""

    batches: Any  # a grain DatasetIterator over host batches
    steps_per_epoch: int
    place: Callable[[Any], Any] = jax.device_put  # places a host batch on the devices
    describe: Callable[[int], str] | None = None  # 0-based step -> content of its batch, for error messages


@dataclasses.dataclass(frozen=True)
class Validation:
    """The evaluation that selects the best parameters."""

    evaluate: Callable[[Any], dict]  # parameters -> metrics, TrainConfig.metric among them
    prepare: Callable[[Any], Any] | None = None  # state (donated) -> state to evaluate and save
    begin: float = 0.0  # share of the run before which nothing is evaluated; the best step comes after it


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
    """Trains until the last epoch or until validation stops improving; resumes the run in `workdir`, if any.

    On SIGTERM (or one Ctrl-C) it finishes the step, saves, and raises SystemExit with code 0 (130 for
    Ctrl-C). If one of several processes receives the signal, all of them stop after the next logged step.

    Args:
      state: a registered dataclass with `step` (int32 scalar) and `params`; donated.
      step_fn: `(state, batch) -> (state, metrics)`, jitted; metrics map a name to a pair of device
        scalars (total, count) and include `loss` and `tokens` (real tokens as the total).
      workdir: the folder of `metrics.jsonl`, `tensorboard/`, `checkpoints/` and `curves.png`.
      run_info: identifies the run (config, split checksum), JSON-able; see `check_same_run` for the
        differences that a resumed run may have.
      learning_rate: maps a 0-based step to its learning rate. A line of the log shows that of its last step.
      on_best: `(params, record)`. All processes call it after each evaluation that is the best so far, once
        its checkpoint is on disk. They call it again for the best of the run before `fit` returns, because a
        killed session may have missed a call. `record["step"]` is the step of that evaluation. The next step
        donates `params`: copy arrays that are needed after the call.

    Raises:
      ValueError: the workdir holds a different run, or only damaged checkpoints; unknown metric.
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
                    session.saver.wait()  # on_best must not write anything newer than the checkpoint.
                    on_best(state.params, record)
            if stopped_by or stopping:
                break

            # Take the next batch and run a step.
            window.open()
            state, metrics = step_fn(state, data.place(session.next_batch(step)))
            window.add(metrics, step)
            step += 1
            session.monitor.advance()

            # Log, always before an evaluation or a save: it raises if numbers are not finite.
            is_logged = window.is_first or schedule.logs(step)
            stopping = stop.agreed(is_logged)
            if is_logged or stopping:
                session.log(window, step, learning_rate)
        session.saver.wait()
        if stopping:  # The next session evaluates this step if that is due, also after the last step.
            session.monitor.say(f"{stopping.name}: stopped and saved at step {step}; run again to resume")
            raise SystemExit(0 if stopping == signal.SIGTERM else 130)
        result = session.result(state, step, stopped_by, on_best)
        session.monitor.say(
            f"{'already ' if window.is_first else ''}finished at step {step} ({stopped_by}); best "
            f"{config.metric} {result.best_value:.4f} at step {result.best_step}"
        )
        return result


class _Session:
    """One session (one call of `fit`) of a run: the run's progress, and the files it reads and writes."""

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
        """Returns the state to start from: the newest saved one, or `state`. `stack` closes the files."""
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
        """Corrects `progress` if the best checkpoint is damaged: the best is then an earlier one, or none."""
        progress = self.progress
        best = restore_best(self._folder, params, max_step=self.saved_step)
        saved = best.record["progress"] if best else {"best_step": 0, "best_value": 0.0}
        if saved["best_step"] == progress.best_step:
            return
        text = f"the best is now step {saved['best_step']} ({saved['best_value']:.4f})"
        if best is None:
            text = "the next evaluation becomes the best"
            # Evaluate the current step again, if an evaluation is due there.
            progress.eval_step = progress.num_bad_evals = 0
        self.monitor.say(f"the best checkpoint (step {progress.best_step}) is lost: {text}")
        progress.best_step, progress.best_value = saved["best_step"], saved["best_value"]

    def evaluate(self, state, step: int) -> tuple[Any, bool]:
        """Evaluates and logs; returns (state, whether this evaluation is the best so far)."""
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
        """Starts saving the state, to `best` if `is_best`; returns the record saved with it."""
        if not is_finite(state.params):
            raise FloatingPointError(
                f"the parameters are not finite after step {step}, although its loss is; they were not "
                f"saved. {_ADVICE}"
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
                f"the data ended at step {step} of {self.schedule.total}: the iterator must yield the "
                "batches of all epochs"
            )
        return batch

    def log(self, window: Window, step: int, learning_rate: Callable[[int], float]) -> None:
        """Waits for the steps of the window and logs them.

        Raises FloatingPointError if a metric is not finite, SaveError if a save has failed in the meantime.
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
            f"{_ADVICE}"
        )

    def result(self, state, step: int, stopped_by: str, on_best) -> FitResult:
        self.monitor.plot(self._config.metric)
        best = restore_best(self._folder, state.params)
        if best is None:
            raise DamagedError(
                f"no best checkpoint in {self._folder / 'best'} can be read: run the same command again to "
                "evaluate and save the last state"
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
    """Records the first SIGTERM or Ctrl-C, so that the loop stops after the step; a second one kills."""

    caught: signal.Signals | None = None

    def agreed(self, is_logged: bool) -> signal.Signals | None:
        """Returns the signal that this process has caught. Several processes agree on the signal that any of
        them has caught, but communicate only after logged steps."""
        if jax.process_count() == 1:
            return self.caught
        number = processes.largest(self.caught or 0) if is_logged else 0
        return signal.Signals(number) if number else None

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Other threads cannot set handlers.
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
        raise FloatingPointError(f"the validation metric {name} is {value}. {_ADVICE}")
    return value
