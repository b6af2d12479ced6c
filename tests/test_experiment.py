"""Configs whose parts do not go together are refused before anything runs, with the way out."""

import dataclasses

import pytest

from rec_jax.experiment import ExperimentConfig
from rec_jax.train.tables import TableConfig

BASE = ExperimentConfig()
SAMPLED = dataclasses.replace(BASE.loss, type="sampled_softmax")
ROWS = TableConfig(optimizer="lazy_adam", layout="rows")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"table": TableConfig(optimizer="sgd")}, "optimizer='sgd'.*loss.type='softmax'.*sampled loss"),
        (
            {"table": ROWS, "loss": SAMPLED, "optim": dataclasses.replace(BASE.optim, clip_norm=1.0)},
            "clip_norm=1.0.*layout='replicated'",
        ),
        ({"eval": dataclasses.replace(BASE.eval, baselines=("popularity", "knn"))}, "no knn; use popularity"),
    ],
)
def test_parts_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layout": "rows"}, "layout='rows'.*optimizer other than 'dense'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive .TableConfig"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 must be positive"),
    ],
)
def test_tables_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        TableConfig(**changes)
