"""Every model works with every loss and augmentation that it supports. Steps are traced, not compiled."""

import jax
import numpy as np
import pytest
from test_contracts import MAX_LEN, NUM_ITEMS, small

from rec_jax.data.batch import Batch
from rec_jax.data.datasets import DataConfig
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.models.base import define_model
from rec_jax.models.registry import MODELS, model_builder
from rec_jax.models.tiger import TigerConfig
from rec_jax.objectives.augment import AugmentConfig
from rec_jax.objectives.contrastive import ContrastiveConfig
from rec_jax.objectives.token_loss import BCEConfig, SoftmaxConfig
from rec_jax.run_config import ExperimentConfig
from rec_jax.train.loop import TrainConfig
from rec_jax.training import make_step


@pytest.mark.parametrize(
    "config_class", [x for x in MODELS if not MODELS[x].is_generative], ids=lambda config: config.type
)
def test_all_options_at_once(config_class):
    is_causal = MODELS[config_class].is_causal
    augmentation = {
        "augment": AugmentConfig(crop=0.5, reorder=0.5),
        "contrastive": ContrastiveConfig(weight=0.1, view="augment"),
    }
    config = ExperimentConfig(
        data=DataConfig(max_len=MAX_LEN),
        model=small(config_class, num_layers=1, num_future=2 if is_causal else 1),
        loss=SoftmaxConfig(ips_power=0.5, popularity_discount=0.5, matryoshka=(2, 4)),
        train=TrainConfig(batch_rows=4, micro_rows=2),
        **augmentation if is_causal else {},
    )
    model = define_model(model_builder(config.model, NUM_ITEMS, MAX_LEN))
    step = make_step(config, model, np.ones(NUM_ITEMS + 1), make_mesh(MeshConfig(data=1)))
    ids = jax.ShapeDtypeStruct((4, MAX_LEN), np.int32)
    events = {name: ids for name in ("item", *model.columns)}
    batch = Batch(events, segments=ids, positions=ids, next={"item": ids})
    state, metrics = jax.eval_shape(step, step.abstract_state(), batch)
    assert metrics["loss"][0].shape == ()
    assert ("future" in state.params) == is_causal


@pytest.mark.parametrize(
    "options",
    [
        {"loss": SoftmaxConfig(matryoshka=(2,))},
        {"loss": SoftmaxConfig(ips_power=0.5)},
        {"loss": SoftmaxConfig(popularity_discount=0.5)},
        {"loss": BCEConfig()},
        {"augment": AugmentConfig(crop=0.5)},
        {"contrastive": ContrastiveConfig(weight=0.1)},
        {"model": TigerConfig(num_future=2)},
    ],
)
def test_a_generative_retrieval_model_accepts_only_its_own_loss(options):
    with pytest.raises(ValueError, match="leave it at its default"):
        ExperimentConfig(**{"model": TigerConfig(), **options})
