"""One training step: pure, jitted, its state donated."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rec_jax.data.negatives import Sampler
from rec_jax.hashing import mix, row_keys
from rec_jax.models.base import Model, get_table, with_table, without_table
from rec_jax.nn import parallel
from rec_jax.nn.layouts import shardings
from rec_jax.nn.sharded import AXES
from rec_jax.train.losses import LossConfig, draw_negatives, draw_shared
from rec_jax.train.objective import make_objective
from rec_jax.train.precision import DTYPES, F32, PrecisionConfig
from rec_jax.train.state import TrainState
from rec_jax.train.tables import ItemTable
from rec_jax.tree import cast_floats


def state_specs(
    abstract_params, optimizer, specs=None, item_table: ItemTable | None = None, precision=F32
) -> TrainState:
    """How a state lies on the mesh.

    specs: of all parameters but the table of items, from `parallel.partition`; None = whole on every device.
    """
    dense = abstract_params if item_table is None else without_table(abstract_params)
    specs = jax.tree.map(lambda _: P(), dense) if specs is None else specs
    opt_state = jax.eval_shape(optimizer.init, dense)
    opt_specs = optax.tree.map_params(
        optimizer, lambda _, spec: spec, opt_state, specs, transform_non_params=lambda _: P()
    )
    if item_table is None:
        return TrainState(P(), specs, opt_specs)
    layout = item_table.layout
    arrays = jax.eval_shape(layout.arrange, get_table(abstract_params))
    table_state = jax.eval_shape(layout.init_state(item_table.optimizer), arrays)
    opt_specs = (opt_specs, layout.state_specs(table_state))
    return TrainState(P(), with_table(specs, layout.spec), opt_specs)


def init_state(
    params,
    optimizer,
    mesh: Mesh,
    item_table: ItemTable | None = None,
    specs=None,
    precision=F32,
) -> TrainState:
    """The state on the mesh. optimizer: of all parameters; of all but the table of items where there is an
    item_table. specs: see `state_specs`."""
    wanted = shardings(mesh, state_specs(params, optimizer, specs, item_table, precision))
    step = jax.device_put(jnp.zeros((), jnp.int32), wanted.step)
    if item_table is None:
        params = jax.device_put(cast_floats(params, DTYPES[precision.params]), wanted.params)
        opt_state = jax.jit(optimizer.init, out_shardings=wanted.opt_state)(params)
        return TrainState(step, params, opt_state)
    dense = jax.device_put(without_table(params), without_table(wanted.params))
    dense_state = jax.jit(optimizer.init, out_shardings=wanted.opt_state[0])(dense)
    arrays = item_table.layout.place(get_table(params))
    table_state = item_table.layout.init(item_table.optimizer, arrays)
    return TrainState(step, with_table(dense, arrays), (dense_state, table_state))


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    loss_config: LossConfig,
    sampler: Sampler | None,
    mesh: Mesh,
    *,
    micro_rows: int,
    precision: PrecisionConfig = F32,
    seed: int = 0,
    clip_norm: float = 0.0,
    item_table: ItemTable | None = None,
    specs=None,
    reduce: Literal["f32", "bf16"] = "f32",
    extras=None,
    views=None,
):
    """Returns jitted `step(state, batch) -> (state, metrics)`, which consumes `state`.

    batch: a `Batch`, its rows split over the mesh axis "data".
    Each device walks its rows `micro_rows` at a time and sums loss and gradients in f32, so neither the
    number of devices nor of micro-steps changes the result but for rounding. On a CPU small micro-batches
    stay in cache. All randomness follows from (seed, state.step, row of the batch).

    clip_norm: global norm that the gradient is scaled down to; 0 = off. item_table: reads and updates the
    table of items, and `optimizer` the other parameters only. specs: see `state_specs`. reduce: the type in
    which gradients are summed over devices. extras: what compression adds (`compress.training`).
    views: `contrastive.Views`, which change the batch and may add to the loss.

    metrics: {"loss": (sum, tokens), "grad_norm": (norm, 1), "tokens": (tokens, 1)} of f32 scalars; with an
    item_table also "table_rounds": (rounds, 1), more than 1 where ids exceeded the capacity of an exchange.
    """
    abstract_params = model.abstract_params if extras is None else extras.abstract_params
    state_spec = state_specs(abstract_params, optimizer, specs, item_table, precision)
    dense_specs = state_spec.params if item_table is None else without_table(state_spec.params)
    placement = item_table.placement if item_table is not None and item_table.is_dense else None
    contrastive = views.contrastive if views and views.contrastive.weight else None
    objective = make_objective(model, loss_config, sampler, precision, placement, extras, contrastive)
    value_and_grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)

    def micro_sums(params, catalogue_vD, batch, context):
        """((loss, tokens), gradients of the first two) of this device's rows."""
        num_rows = len(batch.segments)
        size = min(micro_rows, num_rows)
        if num_rows % size:
            raise ValueError(f"micro_rows={micro_rows} does not divide the {num_rows} rows of a device")
        if num_rows == size:  # no accumulation: spare a pass over all gradients
            return value_and_grad(params, catalogue_vD, batch, context)
        micros = jax.tree.map(lambda x: x.reshape(num_rows // size, size, *x.shape[1:]), batch)

        def micro_step(sums, micro):
            more = value_and_grad(params, catalogue_vD, micro, context)
            return jax.tree.map(jnp.add, sums, more), None

        zero = jnp.zeros((), jnp.float32)
        zeros = ((zero, zero), jax.tree.map(jnp.zeros_like, (params, catalogue_vD)))
        return jax.lax.scan(micro_step, zeros, micros)[0]

    def read_table(array, table_state, batch, step_seed, shared):
        """What the batch refers to in the table of items, and batch and negatives as places in it."""
        ids, drawn = lookups(loss_config, sampler, step_seed, batch, shared)
        read, places = item_table.read(array, table_state, ids)
        shared = shared._replace(places_BSK=places.pop("shared"))
        if "negatives" in places:
            places["negatives"] = drawn._replace(places_BSK=places["negatives"])
        if item_table.is_dense:
            places["targets"] = item_table.placement.to_physical(batch.targets)
        views = zip(batch.views, places.pop("views"), strict=True)
        views = tuple(view.replace(places={"items": {"events": place}}) for view, place in views)
        return read, batch.replace(places={"items": places}, views=views), shared

    def clip(squares, grads):
        norm = jnp.sqrt(squares)
        return jax.tree.map(lambda g: jnp.where(norm < clip_norm, g, g / norm * clip_norm), grads)

    def dense_step(state: TrainState, batch, context):
        params = cast_floats(
            parallel.gather(state.params, dense_specs), jnp.float32
        )  # as gradients are summed
        sums, (grads, _) = micro_sums(params, None, batch, context)
        loss, tokens = parallel.reduce(sums, (P(), P()))
        grads = parallel.reduce(grads, dense_specs, DTYPES[reduce])
        grads = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1), grads)
        squares = parallel.sum_squares(grads, dense_specs)
        if clip_norm:
            grads = clip(squares, grads)
        updates, new_opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates), new_opt_state
        metrics = {"grad_norm": (jnp.sqrt(squares), 1)}
        return TrainState(state.step + 1, *new), (loss, tokens), metrics

    def table_step(state: TrainState, batch, context):
        layout, dense, array = item_table.layout, without_table(state.params), get_table(state.params)
        dense_state, table_state = state.opt_state
        read, batch, shared = read_table(array, table_state, batch, context["step_seed"], context["shared"])
        context = {**context, "shared": shared}
        params = with_table(parallel.gather(dense, dense_specs), read.rows_UD)
        catalogue_vD = array if item_table.is_dense else None
        sums, (grads, catalogue_grads) = micro_sums(params, catalogue_vD, batch, context)

        sums = parallel.reduce(sums, (P(), P()))
        dense_grads = parallel.reduce(without_table(grads), dense_specs, DTYPES[reduce])
        touched, table_grads = layout.sum_grads(read.touched, get_table(grads))
        if item_table.is_dense:
            table_grads = layout.scatter(touched, table_grads) + catalogue_grads
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums[1], 1), (dense_grads, table_grads))
        squares = parallel.sum_squares(grads[0], dense_specs)
        if item_table.is_dense:
            squares += jax.lax.psum(jnp.sum(grads[1] ** 2), AXES)
        elif clip_norm:  # where owners sum the gradients of rows, this takes an exchange of its own
            squares += layout.sum_squares(touched, grads[1])
        if clip_norm:
            grads = clip(squares, grads)

        updates, dense_state = optimizer.update(grads[0], dense_state, dense)
        if item_table.is_dense:
            array, table_state = item_table.update_dense(array, table_state, grads[1])
        else:
            array, table_state, row_squares = layout.update(
                item_table.optimizer, array, table_state, touched, grads[1]
            )
            squares = squares if clip_norm else squares + row_squares
        params = with_table(optax.apply_updates(dense, updates), array)
        metrics = {"grad_norm": (jnp.sqrt(squares), 1), "table_rounds": (read.rounds, 1)}
        return TrainState(state.step + 1, params, (dense_state, table_state)), sums, metrics

    def device_step(state: TrainState, batch, context):
        if views:
            batch = views.change(batch, context["step_seed"])
        return (dense_step if item_table is None else table_step)(state, batch, context)

    on_mesh = jax.shard_map(
        device_step,
        mesh=mesh,
        in_specs=(state_spec, P("data"), P()),
        out_specs=(state_spec, P(), P()),
        check_vma=False,
    )

    def step(state: TrainState, batch, frozen=None):
        step_seed = step_seed_of(state.step, seed)
        batch = batch.replace(row_ids=jnp.arange(len(batch.segments), dtype=jnp.int32))
        shared = draw_shared(loss_config, sampler, step_seed, batch.targets)
        context = {"step_seed": step_seed, "shared": shared, "step": state.step, "frozen": frozen}
        state, (loss, tokens), metrics = on_mesh(state, batch, context)
        metrics |= {"loss": (loss, tokens), "tokens": (tokens, 1)}
        return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

    # Said here, because XLA may find another name for it on a mesh of one.
    out_shardings = (shardings(mesh, state_spec), shardings(mesh, P()))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out_shardings)
    # Arguments, not constants: a compiled program would hold them once more.
    return jitted if extras is None else partial(jitted, frozen=extras.frozen)


def step_seed_of(step, seed: int):
    """uint32: all that is random in a step follows from it and the rows of the batch."""
    return mix(mix(step), seed)


def lookups(loss_config: LossConfig, sampler, step_seed, batch, shared):
    """({name: ids that rows of a batch look up}, the negatives drawn for them, if any are drawn by row)."""
    ids = {"events": batch.items, "targets": batch.targets, "shared": shared.ids_BSK}
    ids["views"] = [view.items for view in batch.views]
    if loss_config.type == "softmax" or loss_config.sharing == "batch":
        return ids, None
    key_B = row_keys(step_seed, batch.row_ids)
    drawn = draw_negatives(loss_config, sampler, key_B, batch.segments.shape[1], shared)
    return ids | {"negatives": drawn.ids_BSK}, drawn


def make_catch_up(item_table: ItemTable | None, mesh: Mesh, state_spec: TrainState):
    """state -> state with every row of the table as an evaluation should see it; None if rows miss
    nothing."""
    if item_table is None or getattr(item_table.optimizer, "missed", None) is None:
        return None

    def catch_up(state: TrainState) -> TrainState:
        dense_state, table_state = state.opt_state
        array, table_state = item_table.layout.catch_up(
            item_table.optimizer, get_table(state.params), table_state
        )
        return TrainState(state.step, with_table(state.params, array), (dense_state, table_state))

    return jax.jit(catch_up, donate_argnums=0, out_shardings=shardings(mesh, state_spec))
