import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(__file__))
import toy_run

from rec_jax.train.checkpoint import SaveError, Saver, restore_best
from rec_jax.train.loop import TrainConfig
from rec_jax.train.monitor import Monitor, read_metrics

STEPS = 4 * toy_run.STEPS_PER_EPOCH
_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, FitResult) of an uninterrupted run with default settings; tests must not change it."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, toy_run.run(workdir, plots=True)


def test_a_run_trains_evaluates_and_reports(finished):
    workdir, result = finished
    assert result.steps == STEPS and result.stopped_by == "epochs"
    assert int(result.state.step) == STEPS
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "val/ndcg@10" in line] == [7, 14, 21, 28]
    assert [line["step"] for line in lines if "train/loss" in line] == sorted(
        {1, *range(3, 28, 3), *range(5, 28, 5), 7, 14, 21, 28}
    )
    assert result.history == lines
    values = {line["step"]: line["val/ndcg@10"] for line in lines if "val/ndcg@10" in line}
    assert result.best_step == max(values, key=values.get)
    assert result.best_value == values[result.best_step]
    assert toy_run.evaluate(result.best_params)["ndcg@10"] == result.best_value
    assert (workdir / "curves.png").stat().st_size > 1000
    assert list((workdir / "tensorboard").iterdir())
    assert result.progress.tokens_per_sec > 0
    assert result.progress.train_secs > 0 and result.progress.compile_secs > 0


def test_logged_metrics_are_totals_over_counts_since_the_last_log(tmp_path):
    toy_run.run(tmp_path, checkpoint_every_steps=0, log_every_steps=100, epochs=1)
    state, step, losses = toy_run.init(), toy_run.make_step(), []
    for batch in toy_run.batches(7):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert lines[0]["train/loss"] == pytest.approx(losses[0])
    assert lines[1]["step"] == 7
    assert lines[1]["train/loss"] == pytest.approx(np.mean(losses[1:]), rel=1e-5)
    assert lines[1]["train/tokens"] == 3


def test_patience_stops_the_run_and_the_best_parameters_are_returned(tmp_path):
    values = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.2])
    seen = []

    def evaluate(params):
        seen.append(jax.device_get(params))
        return {"ndcg@10": next(values)}

    result = toy_run.run(tmp_path, epochs=6, patience=2, evaluate_fn=evaluate)
    assert result.stopped_by == "patience" and result.steps == 4 * 7  # An equal value is no improvement.
    assert result.best_step == 14 and result.best_value == 0.5
    np.testing.assert_array_equal(result.best_params["w"], seen[1]["w"])


def test_patience_zero_never_stops_the_run(tmp_path):
    result = toy_run.run(tmp_path, patience=0, evaluate_fn=lambda params: {"ndcg@10": 0.0})
    assert result.steps == STEPS and result.best_step == 7


def test_evaluations_several_times_an_epoch(tmp_path):
    result = toy_run.run(tmp_path, eval_every_epochs=0.5, epochs=1)
    steps = [line["step"] for line in result.history if "val/ndcg@10" in line]
    assert steps == [4, 7]  # 3.5 rounds to 4; the last step is always evaluated.


def test_evaluations_start_after_the_configured_share_of_the_run(tmp_path):
    result = toy_run.run(tmp_path, eval_from=0.5)  # of 28 steps: not at 7 and 14
    assert [line["step"] for line in result.history if "val/ndcg@10" in line] == [21, 28]
    result = toy_run.run(tmp_path / "end", eval_from=1.0)
    assert [line["step"] for line in result.history if "val/ndcg@10" in line] == [28]


def _no_step(state, batch):
    raise AssertionError("a step was taken")


def _stopping_step(num: int):
    """Returns a step that sends SIGTERM to its process in call number `num`."""
    inner, calls = toy_run.make_step(), []

    def step(state, batch):
        calls.append(1)
        if len(calls) == num:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(state, batch)

    return step


def test_a_finished_run_is_not_trained_again(finished, tmp_path, capsys):
    first = finished[1]
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    again = toy_run.run(tmp_path, step=_no_step, evaluate_fn=None)
    assert "already finished at step 28" in capsys.readouterr().err
    assert toy_run.digest(again.state) == toy_run.digest(first.state)
    assert toy_run.digest(again.best_params) == toy_run.digest(first.best_params)
    assert (tmp_path / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()
    assert again.progress == first.progress and again.best_step == first.best_step


def test_on_best_is_called_once_the_checkpoint_is_on_disk(tmp_path):
    values, calls = {7: 0.1, 14: 0.5, 21: 0.4, 28: 0.3}, []
    evaluations = iter(values.values())

    def on_best(params, record):
        restored = restore_best(tmp_path / "checkpoints", params)
        assert restored.record["step"] == record["step"]
        jax.tree.map(np.testing.assert_array_equal, restored.state, params)
        calls.append((record["step"], record["progress"]["best_value"]))

    fields = {"evaluate_fn": lambda params: {"ndcg@10": next(evaluations)}, "on_best": on_best}
    toy_run.run(tmp_path, **fields)
    assert calls == [(7, 0.1), (14, 0.5), (14, 0.5)]  # The last call is made at the end of the run.
    toy_run.run(tmp_path, **fields)  # A finished run calls it again, in case its output was lost.
    assert calls[3:] == [(14, 0.5)]


def test_on_best_is_not_called_if_the_save_fails(tmp_path, monkeypatch):
    calls = []

    def fail(self):
        if self._pending >= 0:
            raise SaveError("the disk is full")

    monkeypatch.setattr(Saver, "wait", fail)
    with pytest.raises(SaveError):
        toy_run.run(tmp_path, checkpoint_every_steps=0, on_best=lambda *best: calls.append(best))
    assert not calls


def test_a_run_can_be_extended(finished, tmp_path):
    toy_run.run(tmp_path, epochs=2)
    extended = toy_run.run(tmp_path, epochs=4)
    assert toy_run.digest(extended.state) == toy_run.digest(finished[1].state)


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_run_with_a_decaying_rate_keeps_its_length(tmp_path, is_finished):
    """Another number of epochs is refused before any step, and nothing is written."""
    cosine = {"optim": {"schedule": "cosine"}}
    with contextlib.nullcontext() if is_finished else pytest.raises(SystemExit):
        toy_run.run(tmp_path, epochs=2, settings=cosine, step=None if is_finished else _stopping_step(9))
    lines = (tmp_path / "metrics.jsonl").read_text()
    for epochs in (1, 4):
        with pytest.raises(ValueError, match=rf"train.epochs \(saved 2, now {epochs}\).*schedule='cosine'"):
            toy_run.run(tmp_path, epochs=epochs, settings=cosine, step=_no_step, evaluate_fn=None)
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    assert toy_run.run(tmp_path, epochs=2, settings=cosine).steps == 14


def test_a_run_stopped_by_patience_resumes_with_more_patience(tmp_path):
    fields = {"evaluate_fn": lambda params: {"ndcg@10": 0.5}, "settings": {"optim": {"schedule": "cosine"}}}
    stopped = toy_run.run(tmp_path, patience=1, **fields)
    assert stopped.stopped_by == "patience" and stopped.steps == 14
    resumed = toy_run.run(tmp_path, patience=0, **fields)
    assert resumed.stopped_by == "epochs" and resumed.steps == STEPS


def test_the_validation_metric_may_change_once_the_run_is_finished(tmp_path, capsys):
    unseen, all_items = ({"eval": {"filter_seen": value, "ks": [10]}} for value in (True, False))
    with pytest.raises(SystemExit):
        toy_run.run(tmp_path, settings=unseen, step=_stopping_step(9))
    with pytest.raises(ValueError, match=r"eval.filter_seen \(saved True, now False\)"):
        toy_run.run(tmp_path, settings=all_items, step=_no_step)
    with pytest.raises(SystemExit):  # after the last step, but before its evaluation
        toy_run.run(tmp_path / "end", settings=unseen, step=_stopping_step(STEPS))
    with pytest.raises(ValueError, match=r"eval.filter_seen"):
        toy_run.run(tmp_path / "end", settings=all_items, step=_no_step)
    best = toy_run.run(tmp_path, settings=unseen).best_step
    capsys.readouterr()
    assert toy_run.run(tmp_path, settings=all_items, step=_no_step, evaluate_fn=None).best_step == best
    assert "changed since then: config.eval.filter_seen (saved True, now False)" in capsys.readouterr().err


def test_the_learning_rate_of_the_last_step_is_logged(finished):
    lines = [line for line in finished[1].history if "train/loss" in line]
    assert lines and all(line["train/learning_rate"] == 0.04 / line["step"] for line in lines)


def test_another_config_in_the_same_workdir_is_refused(finished):
    with pytest.raises(ValueError, match=r"batch_rows \(saved 32, now 8\).*new workdir"):
        toy_run.run(finished[0], batch_rows=8, step=_no_step)


def test_nan_is_reported_with_its_step_and_batch(finished, tmp_path):
    with pytest.raises(FloatingPointError) as error:
        toy_run.run(tmp_path, step=toy_run.make_step(nan_at=16), log_every_steps=50)
    message = str(error.value)
    assert "loss became NaN or infinite at step 17: epoch 3, batch 3 of 7" in message
    assert "last saved step is 15" in message
    # The saved state is intact: a run without the NaN resumes from it.
    resumed = toy_run.run(tmp_path, log_every_steps=50)
    assert toy_run.digest(resumed.state) == toy_run.digest(finished[1].state)


def test_nan_parameters_are_never_saved(tmp_path):
    # The loss of step 15 is finite, but its update is not, and a save is due after step 15.
    with pytest.raises(FloatingPointError, match="parameters are not finite after step 15"):
        toy_run.run(tmp_path, step=toy_run.make_step(nan_params_at=14))
    saved = [path.name for path in (tmp_path / "checkpoints").glob("*/*")]
    assert "15" not in saved and "14" in saved


def test_an_unknown_metric_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metric='mrr' is not among .*ndcg@10, error"):
        toy_run.run(tmp_path, metric="mrr")


def test_data_that_end_early_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_run, "batches", lambda *_, short=toy_run.batches: short(10))
    with pytest.raises(ValueError, match="the data ended at step 10 of 28"):
        toy_run.run(tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"epochs": 0}, r"epochs=0 must be at least 1 \(TrainConfig\)"),
        ({"patience": -1}, r"patience=-1 must be at least 0"),
        ({"eval_every_epochs": 0.0}, r"eval_every_epochs=0\.0 must be positive"),
    ],
)
def test_invalid_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_the_host_does_not_run_far_ahead(tmp_path, monkeypatch):
    """At most a few steps are queued: the loop waits for an earlier step before it queues another."""
    waited = []
    array_type = type(jnp.zeros(()))
    block = array_type.block_until_ready
    monkeypatch.setattr(array_type, "block_until_ready", lambda self: (waited.append(1), block(self))[1])
    toy_run.run(tmp_path, log_every_steps=1000, checkpoint_every_steps=0)
    assert len(waited) >= STEPS - 4


@pytest.mark.parametrize("step", [10, 14, 28])  # within an epoch; where an evaluation is due; the last step
def test_sigterm_saves_and_a_resumed_run_is_bit_equal(finished, tmp_path, step):
    with pytest.raises(SystemExit) as stop:
        toy_run.run(tmp_path, step=_stopping_step(step))
    assert stop.value.code == 0
    assert (tmp_path / "checkpoints/latest" / str(step)).is_dir()
    _assert_same(toy_run.run(tmp_path), finished[1])


def _assert_same(resumed, expected):
    """Asserts equal bits of states and best parameters, and equal evaluations, each logged once."""
    assert toy_run.digest(resumed.state) == toy_run.digest(expected.state)
    assert toy_run.digest(resumed.best_params) == toy_run.digest(expected.best_params)
    assert resumed.best_step == expected.best_step and resumed.best_value == expected.best_value
    assert resumed.stopped_by == expected.stopped_by and resumed.steps == expected.steps
    assert _evaluations(resumed.history) == _evaluations(expected.history)


def _evaluations(lines):
    return [line for line in lines if "val/ndcg@10" in line]


def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(tmp_path):
    """Sends SIGKILL at random moments, then lets the run finish."""
    expected = toy_run.run(tmp_path / "b", eval_every_epochs=0.5, epochs=6)
    fields = {"eval_every_epochs": 0.5, "epochs": 6, "pause": 0.1}
    rng, num_kills, path = random.Random(0), 0, tmp_path / "a"
    for _ in range(3):
        process = _spawn(path, fields)
        log = path / "metrics.jsonl"
        size = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > size:  # It is training: kill it within half a second.
                time.sleep(rng.uniform(0, 0.5))
                process.kill()
                num_kills += 1
                break
            time.sleep(0.005)
        output, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
    if process.returncode != 0:
        output, errors = _spawn(path, fields).communicate()
    assert num_kills == 3
    result = json.loads(output)
    assert result == {"digest": toy_run.digest(expected.state), "best_step": expected.best_step}
    lines = read_metrics(path / "metrics.jsonl")
    assert _evaluations(lines) == _evaluations(expected.history)


def _spawn(workdir, fields, **popen):
    return subprocess.Popen(
        [sys.executable, toy_run.__file__, str(workdir), json.dumps(fields)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "JAX_NUM_CPU_DEVICES": "1"},
        **popen,
    )


def test_fit_works_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(toy_run.run(tmp_path, epochs=1)))
    thread.start()
    thread.join()
    assert results[0].steps == toy_run.STEPS_PER_EPOCH


def test_monitor_removes_lines_that_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 5, "train/loss": 1.0},
        {"step": 10, "train/loss": 0.5},
        {"step": 10, "val/ndcg@10": 0.1},  # Its evaluation is not part of the restored run.
        {"step": 11, "train/loss": 0.4},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "tr')
    Monitor(tmp_path, total_steps=20, step=10, eval_step=5).close()
    assert read_metrics(path) == lines[:2]
    path.write_text(path.read_text() + '{"step": 12, "tr')
    monitor = Monitor(tmp_path, total_steps=20, step=0, eval_step=0)
    monitor.log(1, 0.1, {"val/ndcg@10": 0.1, "val/ndcg@10_ci": [0.0, float("nan")]})
    monitor.close()
    assert read_metrics(path) == [
        {"step": 1, "epoch": 0.1, "val/ndcg@10": 0.1, "val/ndcg@10_ci": [0.0, None]}
    ]
