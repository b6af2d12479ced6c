"""Builds the training step of a config from its tables, objective and optimizer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.compress.config import CompressConfig
from rec_jax.compress.training import Compression
from rec_jax.mesh import replicate
from rec_jax.models.base import Model
from rec_jax.models.registry import MODELS
from rec_jax.nn.parallel import partition
from rec_jax.objectives.negatives import make_prior
from rec_jax.objectives.objective import Fixed, Objective
from rec_jax.objectives.token_loss import num_negatives
from rec_jax.run_config import ExperimentConfig
from rec_jax.tables.config import make_tables
from rec_jax.tables.plan import LayoutCost, choose_layout, ids_per_device, layout_costs
from rec_jax.train.optim import make_optimizer, make_schedule
from rec_jax.train.precision import kept_as
from rec_jax.train.step import StepSettings, TrainStep
from rec_jax.tree import leaf_names


def num_lookups(config: ExperimentConfig, mesh) -> int:
    """The number of ids that one device looks up in the item embedding table per step."""
    rows, length = config.train.batch_rows // mesh.shape["data"], config.data.max_len
    num_views = 2 * config.contrastive.augments
    return ids_per_device(rows, length, num_negatives(config.loss, rows, length), num_views)


def plan_layouts(config: ExperimentConfig, num_items: int, mesh) -> list[LayoutCost]:
    """Returns the cost per device of each layout of the item embedding table."""
    shape, axes = (num_items + 1, config.model.table_dim), (mesh.shape["data"], mesh.shape["model"])
    return layout_costs(config.table, config.optim.type, *shape, num_lookups(config, mesh), *axes)


def with_layout(config: ExperimentConfig, num_items: int, mesh) -> ExperimentConfig:
    """Returns the config with table.layout="auto" replaced by the layout that the plan chooses."""
    layout = "replicated"  # for models without tables
    if MODELS[type(config.model)].tables:
        layout = choose_layout(config.table, plan_layouts(config, num_items, mesh))
    return dataclasses.replace(config, table=dataclasses.replace(config.table, layout=layout))


def make_step(
    config: ExperimentConfig,
    model: Model,
    item_counts: np.ndarray,
    mesh,
    *,
    total_steps: int = 1,
    teachers=(),
    base=None,
    neighbours_VK=None,
) -> TrainStep:
    """Returns the training step of a config.

    item_counts: int[V + 1] training events of each item. total_steps: steps of the whole training, for
    schedules. teachers, base: see `Compression`. neighbours_VK: see `augment`; needed to substitute items.
    """
    config = with_layout(config, len(item_counts) - 1, mesh)
    optim, table = config.optim, config.table
    compression = None
    if config.compress != CompressConfig():  # otherwise the step needs no compression code
        compression = Compression(
            config.compress, model, total_steps, config.seed, teachers, replicate(base, mesh)
        )
    shapes = leaf_names(model.abstract_params)
    tables = make_tables(
        table,
        {name: (path, shapes[path].shape[0]) for name, path in model.tables.items()},
        mesh,
        make_schedule(dataclasses.replace(optim, learning_rate=table.learning_rate), total_steps),
        optim,
        make_optimizer(dataclasses.replace(optim, weight_decay=0.0), {}, total_steps),
    )
    objective = Objective(
        model,
        config.loss,
        config.precision,
        augment=config.augment,
        contrastive=config.contrastive,
        placement=tables.placement,
        compression=compression,
    )
    dense, _ = tables.split(objective.abstract_params)
    specs = partition(dense, model.dims, mesh, fully_sharded=config.mesh.fully_sharded)
    optimizer = make_optimizer(optim, dense, total_steps)
    if config.precision.params != "f32" or config.precision.optimizer != "f32":
        optimizer = kept_as(optimizer, config.precision.optimizer)
    if compression:
        optimizer = compression.optimizer(optimizer, dense, specs)
    settings = StepSettings(
        config.train.micro_rows, config.seed, optim.clip_norm, config.precision.params, config.mesh.reduce
    )

    def make_fixed():  # called lazily: a sampler of millions of items takes seconds to build
        neighbours = None if neighbours_VK is None else jnp.asarray(neighbours_VK)
        return Fixed(make_prior(config.loss, item_counts), neighbours, compression and compression.frozen)

    return TrainStep(model, objective, tables, optimizer, specs, mesh, settings, make_fixed)


def bytes_per_device(step: TrainStep) -> int:
    """The bytes of parameters and optimizer state on one device, without the tables."""
    state = step.abstract_state()
    dense = step.tables.split(state.params)[0], state.opt_state[0]
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(dense))
