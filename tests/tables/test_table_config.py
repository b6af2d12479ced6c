"""Configs of embedding tables: invalid settings are refused."""

import numpy as np
import optax
import pytest

from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.objectives.token_loss import BCEConfig
from rec_jax.run_config import ExperimentConfig
from rec_jax.tables.config import TableConfig, make_tables
from rec_jax.train.optim import OptimConfig


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"weight_decay": -1.0, "optimizer": "sgd"}, "weight_decay=-1.0"),
        ({"weight_decay": 0.1}, "weight_decay=0.1"),
        ({"layout": "dims"}, "layout='dims'"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 must be positive"),
    ],
)
def test_invalid_table_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TableConfig(**fields)


def test_row_sharding_and_sparse_updates_are_accepted_with_these_losses():
    ExperimentConfig(table=TableConfig(layout="rows"))
    ExperimentConfig(table=TableConfig(optimizer="sgd"), loss=BCEConfig())


def made(config, mesh):
    schedule = optax.constant_schedule(0.1)
    return make_tables(config, {"items": ("items/embedding", 10)}, mesh, schedule, OptimConfig(), None)


def test_meshes_that_cannot_shard_the_table_are_refused():
    config = TableConfig(optimizer="sgd", layout="rows")
    with pytest.raises(ValueError, match="mesh.model = 3 devices, which must divide 1024"):
        made(config, make_mesh(MeshConfig(data=3)))
    config = TableConfig(optimizer="sgd", layout="dims")
    tables = made(config, make_mesh(MeshConfig(data=1, model=4)))
    with pytest.raises(ValueError, match="6 dims over mesh.model=4"):
        tables.place({"items": np.zeros((10, 6), np.float32)})
