"""One training step: pure, jitted, its state donated."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rec_jax.data.negatives import Sampler
from rec_jax.hashing import mix, row_keys
from rec_jax.models.base import Model
from rec_jax.nn.sparse import gather_rows, update_rows
from rec_jax.train.losses import LossConfig, draw_negatives, draw_shared, loss_sum
from rec_jax.train.state import TrainState
from rec_jax.train.tables import compact, get_table, sum_rows, with_table, without_table
from rec_jax.tree import cast_floats

Precision = Literal["f32", "bf16"]  # bf16: compute in bfloat16 over f32 parameters


def init_state(params, optimizer: optax.GradientTransformation, row_optimizer=None) -> TrainState:
    """optimizer: of all parameters, or of all but the table of items where that has a row_optimizer."""
    step = jnp.zeros((), jnp.int32)
    if row_optimizer is None:
        return TrainState(step, params, optimizer.init(params))
    state = (optimizer.init(without_table(params)), row_optimizer.init(get_table(params)))
    return TrainState(step, params, state)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    loss_config: LossConfig,
    sampler: Sampler | None,
    mesh: Mesh,
    *,
    micro_rows: int,
    precision: Precision = "f32",
    seed: int = 0,
    clip_norm: float = 0.0,
    row_optimizer: optax.GradientTransformation | None = None,
):
    """Returns jitted `step(state, batch) -> (state, metrics)`, which consumes `state`.

    batch: items, targets, segments, positions, each int32[B, S] split over the mesh axis "data".
    Each device walks its rows `micro_rows` at a time and sums loss and gradients in f32, so neither the
    number of devices nor of micro-steps changes the result but for rounding. On a CPU small micro-batches
    stay in cache. All randomness follows from (seed, state.step, row of the batch).

    clip_norm: global norm that the gradient is scaled down to; 0 = off. row_optimizer: updates the touched
    rows of the table of items, and `optimizer` the other parameters (see `tables.TableConfig`).

    metrics: {"loss": (sum, tokens), "grad_norm": (norm, 1), "tokens": (tokens, 1)} of f32 scalars.
    """

    def objective(params, micro, step_seed, shared):
        if precision == "bf16":
            params = cast_floats(params, jnp.bfloat16)
        module = model.bind(params)
        key_B = row_keys(step_seed, micro["row_ids"])
        if "negatives" in micro:
            negatives = micro["negatives"]
        else:
            negatives = draw_negatives(loss_config, sampler, key_B, micro["items"].shape[1], shared)
        return loss_sum(loss_config, sampler, module(micro, key_B), module.item_vectors(), micro, negatives)

    value_and_grad = jax.value_and_grad(objective, has_aux=True)

    def total(sums):  # XLA copies everything even where there is nobody to sum with
        return jax.lax.psum(sums, "data") if mesh.size > 1 else sums

    def micro_sums(params, batch, step_seed, shared):
        num_rows = batch["items"].shape[0]
        size = min(micro_rows, num_rows)
        if num_rows % size:
            raise ValueError(f"micro_rows={micro_rows} does not divide the {num_rows} rows of a device")
        if num_rows == size:  # no accumulation: spare a pass over all gradients
            return value_and_grad(params, batch, step_seed, shared)
        micros = jax.tree.map(lambda x: x.reshape(num_rows // size, size, *x.shape[1:]), batch)

        def micro_step(sums, micro):
            return jax.tree.map(jnp.add, sums, value_and_grad(params, micro, step_seed, shared)), None

        zero = jnp.zeros((), jnp.float32)
        zeros = ((zero, zero), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(micro_step, zeros, micros)[0]

    def dense_sums(params, batch, step_seed, shared):
        return *total(micro_sums(params, batch, step_seed, shared)), None

    def touched_sums(params, batch, step_seed, shared):
        """The same, but the model sees, and has gradients for, the rows that the batch refers to alone."""
        ids = {"items": batch["items"], "targets": batch["targets"], "shared": shared.ids_BSK}
        if loss_config.sharing != "batch":
            key_B = row_keys(step_seed, batch["row_ids"])
            drawn = draw_negatives(loss_config, sampler, key_B, batch["items"].shape[1], shared)
            ids["negatives"] = drawn.ids_BSK
        rows_UD, places, rows_U = compact(get_table(params), ids)
        shared = shared._replace(ids_BSK=places["shared"])
        batch = {**batch, "items": places["items"], "targets": places["targets"]}
        if "negatives" in places:
            batch["negatives"] = drawn._replace(ids_BSK=places["negatives"])
        sums, grads = micro_sums(with_table(params, rows_UD), batch, step_seed, shared)
        row_grads_UD = get_table(grads)
        sums, grads = total((sums, without_table(grads)))
        if mesh.size > 1:
            rows_U, row_grads_UD = sum_rows(rows_U, row_grads_UD, get_table(params).shape[0], "data")
        return sums, with_table(grads, row_grads_UD), rows_U

    sharded_sums = jax.shard_map(
        dense_sums if row_optimizer is None else touched_sums,
        mesh=mesh,
        in_specs=(P(), P("data"), P(), P()),
        out_specs=P(),
        check_vma=False,
    )

    def update(grads, rows_U, opt_state, params):
        if row_optimizer is None:
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state
        state, row_state = opt_state
        dense, table_VD = without_table(params), get_table(params)
        updates, state = optimizer.update(without_table(grads), state, dense)
        rows_UD = gather_rows(table_VD, rows_U)
        table_VD, row_state = update_rows(
            row_optimizer, table_VD, row_state, rows_U, rows_UD, get_table(grads)
        )
        return with_table(optax.apply_updates(dense, updates), table_VD), (state, row_state)

    def step(state: TrainState, batch):
        step_seed = mix(mix(state.step), seed)
        batch = {**batch, "row_ids": jnp.arange(batch["items"].shape[0], dtype=jnp.int32)}
        shared = draw_shared(loss_config, sampler, step_seed, batch["targets"])
        (loss, tokens), grads, rows_U = sharded_sums(state.params, batch, step_seed, shared)
        grads = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1), grads)
        norm = optax.tree.norm(grads)
        if clip_norm:
            grads, _ = optax.clip_by_global_norm(clip_norm).update(grads, optax.EmptyState())
        params, opt_state = update(grads, rows_U, state.opt_state, state.params)
        one = jnp.ones((), jnp.float32)
        metrics = {"loss": (loss, tokens), "grad_norm": (norm, one), "tokens": (tokens, one)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)
