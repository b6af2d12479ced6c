"""Settings that may or may not change between two sessions of a run, with the keys of real configs."""

import copy
import dataclasses
import pathlib

import pytest

from rec_jax.run_config import ExperimentConfig
from rec_jax.train import same_run
from rec_jax.train.same_run import changes, check_same_run

PATH = pathlib.Path("run/checkpoints/latest/7")
RUN = {"config": dataclasses.asdict(ExperimentConfig()), "split": "abc"}


def changed(run, **fields):
    """Returns a copy of `run` with other config values, given as `train__epochs=3`."""
    run = copy.deepcopy(run)
    for name, value in fields.items():
        *path, key = name.split("__")
        section = run["config"]
        for part in path:
            section = section[part]
        assert key in section
        section[key] = value
    return run


def check(saved, current, is_finished=False):
    check_same_run(saved, current, PATH, is_finished=is_finished)


def test_the_free_keys_exist():
    flat = changes({}, RUN)
    assert not set(same_run._FREE) - flat.keys()


def test_a_different_run_is_refused_with_the_names_of_its_keys():
    other = changed(RUN, model__width=48, data__max_len=20, train__patience=3) | {"seed": 1}
    del other["split"]
    with pytest.raises(ValueError) as error:
        check(RUN, other)
    for text in (
        str(PATH),
        f"config.model.width (saved {RUN['config']['model']['width']}, now 48)",
        "config.data.max_len",
        "seed (saved nothing, now 1)",
        "split (saved abc, now nothing)",
        "new workdir",
    ):
        assert text in str(error.value)
    assert "patience" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"train__patience": 3, "train__log_every_steps": 7, "mesh__data": 2, "table__capacity_factor": 2.0},
        {"eval__ks": (10,), "eval__bootstrap": 0, "eval__sampled_negatives": 100, "eval__baselines": ()},
        {"eval__batch_bytes": 2**10},
    ],
)
def test_free_keys_may_change(fields):
    check(RUN, changed(RUN, **fields))


@pytest.mark.parametrize(
    "fields", [{"semantic_ids__epochs": 3}, {"mesh__reduce": "bf16"}, {"train__batch_rows": 8}]
)
def test_keys_that_affect_steps_are_refused(fields):
    with pytest.raises(ValueError, match="has other settings"):
        check(RUN, changed(RUN, **fields), is_finished=True)


@pytest.mark.parametrize("fields", [{"eval__filter_seen": False}, {"eval__max_examples": 10}])
def test_the_validation_metric_may_change_only_after_the_run_is_finished(fields):
    with pytest.raises(ValueError, match=rf"config.{next(iter(fields)).replace('__', '.')} \(saved"):
        check(RUN, changed(RUN, **fields))
    check(RUN, changed(RUN, **fields), is_finished=True)


CONSTANT = changed(RUN, train__epochs=4)


@pytest.mark.parametrize("epochs", [3, 8])
@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize(
    "fields, named",
    [
        ({"optim__schedule": "cosine"}, "optim.schedule='cosine'"),
        ({"optim__schedule": "linear"}, "optim.schedule='linear'"),
        (
            {"compress__prune__names": ".*kernel", "compress__prune__end": 0.25},
            "compress.prune.names='.*kernel' compress.prune.end=0.25",
        ),
        (
            {"compress__quant__aware": True, "compress__quant__aware_from": 0.5},
            "compress.quant.aware_from=0.5",
        ),
    ],
)
def test_epochs_may_not_change_if_a_setting_is_relative_to_them(fields, named, epochs, is_finished):
    saved = changed(CONSTANT, **fields)
    check(saved, changed(saved, train__patience=3), is_finished)
    with pytest.raises(ValueError) as error:
        check(saved, changed(saved, train__epochs=epochs), is_finished)
    for text in (f"train.epochs (saved 4, now {epochs})", named, "new workdir", "schedule='constant'"):
        assert text in str(error.value)


@pytest.mark.parametrize("epochs", [3, 8])
@pytest.mark.parametrize(
    "fields",
    [
        {"optim__warmup_steps": 100},
        {"compress__prune__end": 0.5},  # without names: no pruning
        {"compress__quant__aware": True, "compress__quant__aware_from": 0.0},
    ],
)
def test_epochs_may_change_otherwise(fields, epochs):
    saved = changed(CONSTANT, **fields)
    check(saved, changed(saved, train__epochs=epochs))
