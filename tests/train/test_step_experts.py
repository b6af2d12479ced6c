"""Steps of mixtures of experts: the same result on every mesh, and a balance penalty in the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from step_runs import (
    COUNTS,
    LENGTH,
    LOSSES,
    NUM_ITEMS,
    assert_close,
    initial_params,
    make_batch,
    reference,
    run,
)

from rec_jax.hashing import row_keys
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.models.base import define_model
from rec_jax.models.bert4rec import BERT4RecConfig
from rec_jax.models.esasrec import ESASRecConfig
from rec_jax.models.registry import model_builder
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.nn.parallel import partition
from rec_jax.objectives.negatives import make_prior
from rec_jax.objectives.objective import Fixed, Objective, StepContext
from rec_jax.train.precision import PrecisionConfig

FIELDS = {"num_experts": 4, "num_heads": 4}


def mixture(config_class=SASRecConfig, **fields):
    return config_class(
        **{"width": 8, "ff_width": 12, "num_heads": 4, "num_layers": 1, "num_experts": 4} | fields
    )


def test_devices_and_micro_batches_do_not_change_the_result():
    """Shards experts over "model", other parameters over "data", the table over both; two micro-batches."""
    sharding = {"model_axis": 4, "fully_sharded": True, "layout": "rows"}
    assert_close(run("softmax", 2, 2, **sharding, **FIELDS), reference("softmax", **FIELDS))


def test_the_training_loss_includes_the_balance_penalty():
    batch = make_batch().replace(row_ids=np.arange(8, dtype=np.int32))
    context = StepContext(0, jnp.uint32(3), Fixed(make_prior(LOSSES["softmax"], COUNTS)))
    params, models = initial_params(mixture()), {}
    for weight in (0.0, 0.3):
        models[weight] = define_model(model_builder(mixture(balance_weight=weight), NUM_ITEMS, LENGTH))

    @jax.jit
    def compute(params):
        penalties = []
        models[0.3].bind(params)(batch, row_keys(jnp.uint32(3), batch.row_ids), penalties=penalties)
        objectives = [Objective(model, LOSSES["softmax"], PrecisionConfig()) for model in models.values()]
        return [objective(params, None, batch, None, context) for objective in objectives], penalties

    ((plain, _), (loss, tokens)), (penalty_B,) = compute(params)
    np.testing.assert_allclose(loss - plain, np.sum(penalty_B), rtol=1e-3)
    assert 0.3 <= np.sum(penalty_B) / tokens < 0.4  # nearly balanced at initialisation: about weight * 1


@pytest.mark.parametrize("config_class", [SASRecConfig, ESASRecConfig, BERT4RecConfig])
def test_layers_have_a_balance_penalty_in_training_only(config_class):
    model = define_model(model_builder(mixture(config_class, num_layers=3), NUM_ITEMS, LENGTH))
    batch = make_batch().replace(is_query=np.zeros((8, LENGTH), bool))

    def penalties(params, key_B):
        penalties = []
        model.bind(params)(batch, key_B, penalties=penalties)
        return penalties

    training = jax.eval_shape(penalties, model.abstract_params, jnp.arange(8, dtype=jnp.uint32))
    assert [x.shape for x in training] == [(8,)] * 3
    assert jax.eval_shape(penalties, model.abstract_params, None) == []


@pytest.mark.parametrize("config_class", [SASRecConfig, ESASRecConfig])
@pytest.mark.parametrize("num_experts, axis", [(8, "model"), (6, None)])
def test_experts_are_sharded_if_the_mesh_axis_divides_their_number(config_class, num_experts, axis):
    config = mixture(config_class, num_experts=num_experts)
    model = define_model(model_builder(config, NUM_ITEMS, LENGTH))
    mesh = make_mesh(MeshConfig(data=2, model=4))
    specs = partition(model.abstract_params, model.dims, mesh, fully_sharded=False)
    ff = specs["blocks"][0]["ff"]
    assert ff["up_kernel"] == ff["down_kernel"] == P(axis, None, None)
    assert ff["up_bias"] == ff["down_bias"] == P(axis, None) and ff["router_kernel"] == P(None, None)
