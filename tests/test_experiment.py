"""Unsupported combinations of settings are refused before a training starts, with advice what to set."""

import dataclasses

import pytest

from configs.sasrec_ml1m import get_config
from rec_jax.config import build
from rec_jax.experiment import Experiment
from rec_jax.objectives.token_loss import BCEConfig
from rec_jax.run_config import ExperimentConfig
from rec_jax.tables.config import TableConfig

BASE = ExperimentConfig()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"table": TableConfig(optimizer="sgd")},
            "table.optimizer='sgd' .*loss.type='softmax'.*sampled loss",
        ),
        (
            {"table": TableConfig(layout="rows"), "loss": BCEConfig()},
            "layout='rows' with table.optimizer='dense' needs loss.type='softmax', not 'bce'",
        ),
        (
            {"eval": dataclasses.replace(BASE.eval, baselines=("popularity", "knn"))},
            "'knn'.* contains an unknown baseline: choose from popularity",
        ),
    ],
)
def test_unsupported_combinations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_a_training_that_could_not_be_evaluated_is_refused_before_its_first_step(tmp_path):
    cfg = get_config("smoke")
    cfg.eval.sampled_negatives = 1000
    experiment = Experiment(build(ExperimentConfig, cfg), tmp_path)
    with pytest.raises(ValueError, match="sampled_negatives=1000 but user .* unseen items: lower it"):
        experiment.fit()
    assert not {"config.json", "checkpoints", "metrics.jsonl"} & {path.name for path in tmp_path.iterdir()}
