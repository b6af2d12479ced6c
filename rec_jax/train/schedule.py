"""How long a run trains, what is due after which step, and what it has come to."""

import dataclasses
import math


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
    tokens: float = 0.0  # real ones of the timed steps: all but the first of each session
    train_secs: float = 0.0  # of the timed steps, without evaluations and saves
    compile_secs: float = 0.0  # of the first step of each session, which compiles
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
    """What is due after which step.

    eval_from: share of the run before which nothing is evaluated, and so cannot be the best.
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
        """Whether nothing is left to train and to evaluate."""
        return bool(self.stopped_by(step, progress)) and progress.eval_step == step

    def stopped_by(self, step: int, progress: Progress) -> str:
        """Why the run is at its end, or an empty string."""
        if 0 < self._patience <= progress.num_bad_evals:
            return "patience"
        return "epochs" if step >= self.total else ""
