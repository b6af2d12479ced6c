"""Tables as configs describe them: mistakes are named."""

import numpy as np
import pytest

from rec_jax.experiment import ExperimentConfig
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.train.losses import LossConfig
from rec_jax.train.optim import OptimConfig
from rec_jax.train.tables import TableConfig, make_item_table


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"weight_decay": -1.0, "optimizer": "sgd"}, "weight_decay=-1.0"),
        ({"weight_decay": 0.1}, "weight_decay=0.1"),
        ({"layout": "dims"}, "layout='dims'"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 must be positive"),
    ],
)
def test_mistakes_of_one_table(fields, named):
    with pytest.raises(ValueError, match=named):
        TableConfig(**fields)


def test_what_goes_with_the_loss():
    ExperimentConfig(table=TableConfig(layout="rows"))
    ExperimentConfig(table=TableConfig(optimizer="sgd"), loss=LossConfig(type="bce"))


def test_a_mesh_that_cannot_share_the_table():
    config = TableConfig(optimizer="sgd", layout="rows")
    with pytest.raises(ValueError, match="mesh.model = 3 devices, which must divide 1024"):
        make_item_table(config, OptimConfig(), 1, np.ones(10), make_mesh(MeshConfig(data=3)))
    config = TableConfig(optimizer="sgd", layout="dims")
    table = make_item_table(config, OptimConfig(), 1, np.ones(10), make_mesh(MeshConfig(data=1, model=4)))
    with pytest.raises(ValueError, match="6 dims over mesh.model=4"):
        table.layout.place(np.zeros((10, 6), np.float32))
