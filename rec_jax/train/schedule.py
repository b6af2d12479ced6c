"""The length of a run, the actions due after each step, and the progress so far."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    epochs: int = 100
    batch_rows: int = 32  # packed rows per step, over all devices
    micro_rows: int = 4  # rows per device in one micro-batch of a step
    all_windows: bool = False  # train on whole histories, not only on their last data.max_len events
    eval_every_epochs: float = 1.0
    patience: int = 10  # evaluations without improvement before the run stops; 0 = never stop early
    metric: str = "ndcg@10"  # validation metric that selects the best step; larger is better
    checkpoint_every_steps: int = 1000  # in addition to one after every evaluation; 0 = only those
    log_every_steps: int = 50
    keep_checkpoints: int = 2  # newest checkpoints to keep, in addition to the two best

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
    """The data, besides state and data position, that a resumed run needs; saved as JSON."""

    eval_step: int = 0  # step of the last evaluation
    best_step: int = 0  # step of the best evaluation; 0 = no evaluation yet
    best_value: float = 0.0
    num_bad_evals: int = 0  # evaluations since the best one
    tokens: float = 0.0  # real tokens of the timed steps: all except the first of each session
    train_secs: float = 0.0  # duration of the timed steps, without evaluations and saves
    compile_secs: float = 0.0  # duration of the first step of each session, which compiles
    eval_secs: float = 0.0

    @property
    def tokens_per_sec(self) -> float:
        return self.tokens / max(self.train_secs, 1e-9)

    def add_steps(self, tokens: float, secs: float, *, is_compiling: bool) -> None:
        if is_compiling:
            self.compile_secs += secs
        else:
            self.train_secs += secs
            self.tokens += tokens

    def add_evaluation(self, step: int, value: float) -> bool:
        """Counts an evaluation; returns whether it is the best so far."""
        self.eval_step = step
        is_best = self.best_step == 0 or value > self.best_value
        if is_best:
            self.best_step, self.best_value, self.num_bad_evals = step, value, 0
        else:
            self.num_bad_evals += 1
        return is_best


class Schedule:
    """Decides after which steps to evaluate, save, log and stop.

    eval_from: share of the run before which nothing is evaluated; the best step comes after it.
    """

    def __init__(self, config: TrainConfig, steps_per_epoch: int, eval_from: float):
        self.total, self.steps_per_epoch = config.epochs * steps_per_epoch, steps_per_epoch
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

    def is_finished(self, step: int, progress: Progress) -> bool:
        """Whether nothing is left to train or evaluate."""
        return bool(self.stopped_by(step, progress)) and progress.eval_step == step

    def stopped_by(self, step: int, progress: Progress) -> str:
        """Returns why the run ends at this step: "patience" or "epochs"; "" if it continues."""
        if 0 < self._patience <= progress.num_bad_evals:
            return "patience"
        return "epochs" if step >= self.total else ""
