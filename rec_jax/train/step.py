"""One training step: pure, jitted, its state donated."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.data.negatives import Sampler
from rec_jax.hashing import mix, row_keys
from rec_jax.mesh import replicate
from rec_jax.models.base import Model
from rec_jax.train.losses import LossConfig, draw_negatives, draw_shared, loss_sum
from rec_jax.train.state import TrainState
from rec_jax.train.tables import ItemTable, get_table, with_table, without_table
from rec_jax.tree import cast_floats

Precision = Literal["f32", "bf16"]  # bf16: compute in bfloat16 over f32 parameters


def init_state(
    params, optimizer: optax.GradientTransformation, mesh: Mesh, item_table: ItemTable | None = None
) -> TrainState:
    """The state on the mesh. optimizer: of all parameters; of all but the table of items where there is an
    item_table."""
    dense = params if item_table is None else without_table(params)
    state = TrainState(jnp.zeros((), jnp.int32), dense, optimizer.init(dense))
    state = replicate(state, mesh)
    if item_table is None:
        return state
    table = item_table.place(get_table(params))
    opt_state = (state.opt_state, item_table.init(table))
    return dataclasses.replace(state, params=with_table(state.params, table), opt_state=opt_state)


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
    item_table: ItemTable | None = None,
):
    """Returns jitted `step(state, batch) -> (state, metrics)`, which consumes `state`.

    batch: items, targets, segments, positions, each int32[B, S] split over the mesh axis "data".
    Each device walks its rows `micro_rows` at a time and sums loss and gradients in f32, so neither the
    number of devices nor of micro-steps changes the result but for rounding. On a CPU small micro-batches
    stay in cache. All randomness follows from (seed, state.step, row of the batch).

    clip_norm: global norm that the gradient is scaled down to; 0 = off. item_table: updates the touched rows
    of the table of items, and `optimizer` the other parameters only.

    metrics: {"loss": (sum, tokens), "grad_norm": (norm, 1), "tokens": (tokens, 1)} of f32 scalars; with an
    item_table also "table_rounds": (rounds, 1), more than 1 where ids exceeded the capacity of an exchange.
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
        return jax.lax.psum(sums, "data") if mesh.shape["data"] > 1 else sums

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
        return total(micro_sums(params, batch, step_seed, shared))

    def touched_sums(params, batch, step_seed, shared):
        """The same, but the model sees, and has gradients for, the rows that the batch refers to alone."""
        ids = {"items": batch["items"], "targets": batch["targets"], "shared": shared.ids_BSK}
        if loss_config.sharing != "batch":
            key_B = row_keys(step_seed, batch["row_ids"])
            drawn = draw_negatives(loss_config, sampler, key_B, batch["items"].shape[1], shared)
            ids["negatives"] = drawn.ids_BSK
        rows_UD, places, rows_U, rounds = item_table.read(get_table(params), ids)
        shared = shared._replace(ids_BSK=places["shared"])
        batch = {**batch, "items": places["items"], "targets": places["targets"]}
        if "negatives" in places:
            batch["negatives"] = drawn._replace(ids_BSK=places["negatives"])
        sums, grads = micro_sums(with_table(params, rows_UD), batch, step_seed, shared)
        sums, dense_grads = total((sums, without_table(grads)))
        rows_U, grads_UD = item_table.sum_grads(rows_U, get_table(grads))
        return sums, dense_grads, rows_U, grads_UD, rounds

    def on_mesh(function, params_spec, out_specs):
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(params_spec, P("data"), P(), P()),
            out_specs=out_specs,
            check_vma=False,
        )

    def dense_update(state: TrainState, batch, step_seed, shared):
        sums, grads = on_mesh(dense_sums, P(), P())(state.params, batch, step_seed, shared)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums[1], 1), grads)
        metrics = {"grad_norm": optax.tree.norm(grads)}
        grads = clip(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state, sums, metrics

    def touched_update(state: TrainState, batch, step_seed, shared):
        dense, array_VD = without_table(state.params), get_table(state.params)
        params_spec = with_table(jax.tree.map(lambda _: P(), dense), item_table.spec)
        row_spec = P("data") if item_table.placement else P()
        sums, dense_grads, rows_U, grads_UD, rounds = on_mesh(
            touched_sums, params_spec, (P(), P(), row_spec, row_spec, P())
        )(state.params, batch, step_seed, shared)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums[1], 1), (dense_grads, grads_UD))
        dense_grads, grads_UD = clip(grads)
        dense_state, row_state = state.opt_state
        updates, dense_state = optimizer.update(dense_grads, dense_state, dense)
        array_VD, row_state, squares = item_table.update(array_VD, row_state, rows_U, grads_UD)
        params = with_table(optax.apply_updates(dense, updates), array_VD)
        if (
            item_table.placement
        ):  # the same row may have gradients on several devices until its owner sums them
            norm = jnp.sqrt(optax.tree.norm(dense_grads, squared=True) + squares)
        else:
            norm = optax.tree.norm(grads)
        return params, (dense_state, row_state), sums, {"grad_norm": norm, "table_rounds": rounds}

    def clip(grads):
        if not clip_norm:
            return grads
        return optax.clip_by_global_norm(clip_norm).update(grads, optax.EmptyState())[0]

    def step(state: TrainState, batch):
        step_seed = mix(mix(state.step), seed)
        batch = {**batch, "row_ids": jnp.arange(batch["items"].shape[0], dtype=jnp.int32)}
        shared = draw_shared(loss_config, sampler, step_seed, batch["targets"])
        update = dense_update if item_table is None else touched_update
        params, opt_state, (loss, tokens), metrics = update(state, batch, step_seed, shared)
        one = jnp.ones((), jnp.float32)
        metrics = {name: (value.astype(jnp.float32), one) for name, value in metrics.items()}
        metrics |= {"loss": (loss, tokens), "tokens": (tokens, one)}
        return TrainState(state.step + 1, params, opt_state), metrics

    if item_table is None:
        return jax.jit(step, donate_argnums=0)
    whole = NamedSharding(mesh, P())  # said here, because XLA may find another name for it on a mesh of one
    array_VD = jax.eval_shape(item_table.place, get_table(model.abstract_params))
    params = with_table(jax.tree.map(lambda _: whole, model.abstract_params), item_table.sharding)
    state = TrainState(whole, params, (whole, item_table.state_shardings(array_VD)))
    return jax.jit(step, donate_argnums=0, out_shardings=(state, whole))
