"""Configs whose parts do not go together are refused before anything runs, with the way out."""

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
            "layout='rows' with table.optimizer='dense'.*not 'bce'",
        ),
        (
            {"eval": dataclasses.replace(BASE.eval, baselines=("popularity", "knn"))},
            "'knn'.* names what is no baseline: use popularity",
        ),
    ],
)
def test_parts_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_a_training_that_no_evaluation_could_score_is_refused_before_its_first_step(tmp_path):
    cfg = get_config("smoke")
    cfg.eval.sampled_negatives = 1000
    experiment = Experiment(build(ExperimentConfig, cfg), tmp_path)
    with pytest.raises(ValueError, match="sampled_negatives=1000 but user .* untouched items: lower it"):
        experiment.fit()
    assert not {"config.json", "checkpoints", "metrics.jsonl"} & {path.name for path in tmp_path.iterdir()}
