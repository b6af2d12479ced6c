"""The training step: a pure jitted function with donated state, for every model, table, loss and mesh."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rec_jax.data.batch import Batch
from rec_jax.hashing import mix
from rec_jax.models.base import Model
from rec_jax.nn import parallel
from rec_jax.objectives.objective import Fixed, Objective, StepContext
from rec_jax.tables.layouts import shardings
from rec_jax.tables.tables import Tables
from rec_jax.train.precision import DTYPES
from rec_jax.tree import cast_floats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays that a step reads and updates."""

    step: jax.Array  # int32 scalar: number of completed steps
    params: Any  # nested dict of f32 arrays
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StepSettings:
    micro_rows: int  # rows per device in one micro-batch
    seed: int = 0
    clip_norm: float = 0.0  # larger gradients are scaled down to this global norm; 0 = off
    params: str = "f32"  # dtype of the stored parameters
    reduce: str = "f32"  # dtype in which gradients are summed over devices


class TrainStep:
    """The training step as a function: step(state, batch) -> (state, metrics). The state is donated.

    The rows of a batch are split over the mesh axis "data". Each device processes its rows in micro-batches
    of `micro_rows` rows and sums loss and gradients in f32, so that the numbers of devices and micro-batches
    change the result only by rounding. On a CPU, small micro-batches stay in cache. All randomness depends on
    (seed, state.step, row of the batch) only.

    A table can have spare entries: build the model for more items than exist, and set in `fixed` a prior with
    the number that exists (`objectives.negatives.make_prior(..., num_items)`). The prior in `fixed` may be
    replaced at any time without compiling again.

    metrics: {"loss": (sum, tokens), "grad_norm": (norm, 1), "tokens": (tokens, 1)}, f32 scalars; with tables
    also "table_rounds": (rounds, 1), which is above 1 if ids exceeded the capacity of an exchange.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        tables: Tables,
        optimizer: optax.GradientTransformation,
        specs,
        mesh: Mesh,
        settings: StepSettings,
        make_fixed: Callable[[], Fixed],
    ):
        """optimizer: updates all parameters except the tables. specs: the partition specs of these
        parameters, from `parallel.partition`. make_fixed: returns the arrays that every step reads; called
        once, before the first step."""
        self.mesh, self.tables, self._make_fixed = mesh, tables, make_fixed
        self.model, self.objective, self._optimizer = model, objective, optimizer
        self._specs, self._settings = specs, settings

    def __call__(self, state: TrainState, batch: Batch):
        return self._jitted(state, batch, self.fixed)

    def lower(self, state: TrainState, batch: Batch):
        """Lowers the step, to inspect the compiled program; arrays may be abstract."""
        return self._jitted.lower(state, batch, self.fixed)

    @cached_property
    def fixed(self) -> Fixed:
        return self._make_fixed()

    def init(self, params) -> TrainState:
        """Returns the initial state on the mesh. params: the model's, with tables in the order of ids."""
        return self._init(self.objective.trained(params))

    def _init(self, params) -> TrainState:
        placed = shardings(self.mesh, self._state_specs)
        dense, whole = self.tables.split(params)
        dense = jax.device_put(cast_floats(dense, DTYPES[self._settings.params]), placed.params[0])
        arrays = self.tables.place(whole)
        opt_state = jax.jit(self._optimizer.init, out_shardings=placed.opt_state[0])(dense)
        step = jax.device_put(jnp.zeros((), jnp.int32), placed.step)
        return TrainState(step, self.tables.join(dense, arrays), (opt_state, self.tables.init(arrays)))

    def abstract_state(self) -> TrainState:
        """Returns the shapes, dtypes and shardings of a state without computing it."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(self._init, self.objective.abstract_params),
            shardings(self.mesh, self.state_specs),
        )

    @cached_property
    def state_specs(self) -> TrainState:
        """The partition specs of a state."""
        specs = self._state_specs
        return TrainState(specs.step, self.tables.join(*specs.params), specs.opt_state)

    @cached_property
    def _state_specs(self) -> TrainState:
        """The partition specs of a state, with parameters and optimizer state split into (dense, tables)."""
        dense, whole = self.tables.split(self.objective.abstract_params)
        opt_state = jax.eval_shape(self._optimizer.init, dense)
        opt_specs = optax.tree.map_params(
            self._optimizer, lambda _, spec: spec, opt_state, self._specs, transform_non_params=lambda _: P()
        )
        states = jax.eval_shape(lambda whole: self.tables.init(self.tables.place(whole)), whole)
        return TrainState(P(), (self._specs, self.tables.specs), (opt_specs, self.tables.state_specs(states)))

    @cached_property
    def catch_up(self):
        """The jitted function state -> state that applies all pending updates to the tables, for evaluation;
        None if no table optimizer has pending updates."""
        if not self.tables.can_catch_up:
            return None

        def catch_up(state: TrainState) -> TrainState:
            dense, arrays = self.tables.split(state.params)
            arrays, states = self.tables.catch_up(arrays, state.opt_state[1])
            return TrainState(state.step, self.tables.join(dense, arrays), (state.opt_state[0], states))

        return jax.jit(catch_up, donate_argnums=0)

    @cached_property
    def _jitted(self):
        state_spec = self.state_specs
        on_mesh = jax.shard_map(
            self._on_device,
            mesh=self.mesh,
            in_specs=(state_spec, P("data"), P()),
            out_specs=(state_spec, P(), P()),
            check_vma=False,
        )

        def step(state: TrainState, batch: Batch, fixed: Fixed):
            seed = mix(mix(state.step), self._settings.seed)
            batch = batch.replace(row_ids=jnp.arange(len(batch.segments), dtype=jnp.int32))
            shared = self.objective.draw_shared(batch, seed, fixed)
            state, (loss, tokens), metrics = on_mesh(
                state, batch, StepContext(state.step, seed, fixed, shared)
            )
            metrics |= {"loss": (loss, tokens), "tokens": (tokens, 1)}
            return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

        # Set explicitly: XLA may return an equivalent sharding under another spec.
        out_shardings = (shardings(self.mesh, state_spec), shardings(self.mesh, P()))
        return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)

    def _on_device(self, state: TrainState, batch: Batch, context: StepContext):
        """The part of a step that runs on each device, inside a shard_map."""
        tables, specs = self.tables, self._specs
        dense, arrays = tables.split(state.params)
        opt_state, table_states = state.opt_state
        batch = self.objective.prepare(batch, context)
        reads, batch, negatives, context = self._read(arrays, table_states, batch, context)

        whole = cast_floats(parallel.gather(dense, specs), jnp.float32)  # to sum gradients in f32
        trained = whole, reads.entries, tables.shards(arrays)
        sums, grads = self._sum_micro_batches(trained, batch, negatives, context)
        loss, tokens = parallel.reduce(sums, (P(), P()))
        dense_grads = parallel.reduce(grads[0], specs, DTYPES[self._settings.reduce])
        reads, table_grads = tables.sum_grads(reads, grads[1], grads[2])
        grads = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1), (dense_grads, table_grads))

        squares = parallel.sum_squares(grads[0], specs)
        if clip_norm := self._settings.clip_norm:
            squares += tables.sum_squares(reads, grads[1])
            norm = jnp.sqrt(squares)
            grads = jax.tree.map(lambda g: jnp.where(norm < clip_norm, g, g / norm * clip_norm), grads)

        updates, opt_state = self._optimizer.update(grads[0], opt_state, dense)
        arrays, table_states, table_squares = tables.update(arrays, table_states, reads, grads[1])
        if not clip_norm:  # tables.update has summed the squares, which saves an exchange
            squares += table_squares
        params = tables.join(optax.apply_updates(dense, updates), arrays)
        metrics = {"grad_norm": (jnp.sqrt(squares), 1)}
        if tables:
            metrics["table_rounds"] = (sum(reads.rounds.values()), 1)
        return TrainState(state.step + 1, params, (opt_state, table_states)), (loss, tokens), metrics

    def _read(self, arrays, states, batch: Batch, context: StepContext):
        """Returns (reads, batch, negatives, context): the entries of sparse tables that the batch refers to,
        and the other arguments with the indices of their ids among these entries."""
        negatives = None
        if not self.tables:
            return self.tables.read(arrays, states, {}), batch, negatives, context
        item_ids = {}
        if not self.objective.reads_catalogue:
            negatives = self.objective.draw(batch, context)
            drawn = context.shared if negatives is None else negatives
            item_ids = {"targets": batch.targets, "negatives": drawn.ids_BSK}
        module = self.model.bind(self.model.abstract_params)
        ids = [module.table_ids(batch, item_ids), *(module.table_ids(view, {}) for view in batch.views)]
        reads = self.tables.read(
            arrays, states, {name: [x[name] for x in ids] for name in self.tables.tables}
        )
        local_ids, *views = ({name: x[i] for name, x in reads.local_ids.items()} for i in range(len(ids)))
        views = [
            view.replace(local_ids=local_ids_BSK)
            for view, local_ids_BSK in zip(batch.views, views, strict=True)
        ]
        if item_ids:
            local_ids_BSK = local_ids["items"].pop("negatives")
            if negatives is None:
                context = dataclasses.replace(
                    context, shared=dataclasses.replace(context.shared, local_ids_BSK=local_ids_BSK)
                )
            else:
                negatives = dataclasses.replace(negatives, local_ids_BSK=local_ids_BSK)
        return reads, batch.replace(local_ids=local_ids, views=tuple(views)), negatives, context

    def _sum_micro_batches(self, trained, batch: Batch, negatives, context: StepContext):
        """Returns ((loss, tokens), gradients of `trained`), summed over this device's rows."""
        value_and_grad = jax.value_and_grad(self._loss, has_aux=True)
        num_rows = len(batch.segments)
        size = min(self._settings.micro_rows, num_rows)
        if num_rows % size:
            raise ValueError(
                f"micro_rows={self._settings.micro_rows} does not divide the {num_rows} rows of a device: "
                f"choose a divisor of {num_rows}"
            )
        if num_rows == size:  # without accumulation: saves a pass over all gradients
            return value_and_grad(trained, batch, negatives, context)
        micros = jax.tree.map(lambda x: x.reshape(num_rows // size, size, *x.shape[1:]), (batch, negatives))

        def micro_step(sums, micro):
            return jax.tree.map(jnp.add, sums, value_and_grad(trained, *micro, context)), None

        zero = jnp.zeros((), jnp.float32)
        zeros = ((zero, zero), jax.tree.map(jnp.zeros_like, trained))
        return jax.lax.scan(micro_step, zeros, micros)[0]

    def _loss(self, trained, batch, negatives, context):
        dense, rows, shards = trained
        params = self.tables.join(dense, rows)
        scored = self.tables.join(dense, {**rows, **shards}) if shards else None
        return self.objective(params, scored, batch, negatives, context)
