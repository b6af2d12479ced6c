"""Configs whose parts do not go together are refused before anything runs, with the way out."""

import dataclasses

import pytest

from rec_jax.compress.config import CompressConfig
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.run_config import ExperimentConfig
from rec_jax.tables.config import TableConfig

BASE = ExperimentConfig()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"table": TableConfig(optimizer="sgd")}, "optimizer='sgd'.*loss.type='softmax'.*sampled loss"),
        (
            {"table": TableConfig(layout="rows"), "loss": dataclasses.replace(BASE.loss, type="bce")},
            "layout='rows' with table.optimizer='dense'.*not 'bce'",
        ),
        ({"eval": dataclasses.replace(BASE.eval, baselines=("popularity", "knn"))}, "no knn; use popularity"),
        (
            {"model": SASRecConfig(num_experts=2), "compress": CompressConfig(floats="bf16")},
            "num_experts=2 does not go with compress.*num_experts=0",
        ),
    ],
)
def test_parts_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)
