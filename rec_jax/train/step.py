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
from rec_jax.train.losses import LossConfig, draw_negatives, draw_shared, loss_sum
from rec_jax.train.state import TrainState
from rec_jax.tree import cast_floats

Precision = Literal["f32", "bf16"]  # bf16: compute in bfloat16 over f32 parameters


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


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
):
    """Returns jitted `step(state, batch) -> (state, metrics)`, which consumes `state`.

    batch: items, targets, segments, positions, each int32[B, S] split over the mesh axis "data".
    Each device walks its rows `micro_rows` at a time and sums loss and gradients in f32, so neither the
    number of devices nor of micro-steps changes the result but for rounding. On a CPU small micro-batches
    stay in cache. All randomness follows from (seed, state.step, row of the batch).

    metrics: {"loss": (sum, tokens), "grad_norm": (norm, 1), "tokens": (tokens, 1)} of f32 scalars.
    """

    def objective(params, micro, step_seed, shared):
        if precision == "bf16":
            params = cast_floats(params, jnp.bfloat16)
        module = model.bind(params)
        key_B = row_keys(step_seed, micro["row_ids"])
        negatives = draw_negatives(loss_config, sampler, key_B, micro["items"].shape[1], shared)
        return loss_sum(loss_config, sampler, module(micro, key_B), module.item_vectors(), micro, negatives)

    value_and_grad = jax.value_and_grad(objective, has_aux=True)

    def total(sums):  # XLA copies everything even where there is nobody to sum with
        return jax.lax.psum(sums, "data") if mesh.size > 1 else sums

    def device_sums(params, batch, step_seed, shared):
        num_rows = batch["items"].shape[0]
        size = min(micro_rows, num_rows)
        if num_rows % size:
            raise ValueError(f"micro_rows={micro_rows} does not divide the {num_rows} rows of a device")
        if num_rows == size:  # no accumulation: spare a pass over all gradients
            return total(value_and_grad(params, batch, step_seed, shared))
        micros = jax.tree.map(lambda x: x.reshape(num_rows // size, size, *x.shape[1:]), batch)

        def micro_step(sums, micro):
            return jax.tree.map(jnp.add, sums, value_and_grad(params, micro, step_seed, shared)), None

        zero = jnp.zeros((), jnp.float32)
        zeros = ((zero, zero), jax.tree.map(jnp.zeros_like, params))
        return total(jax.lax.scan(micro_step, zeros, micros)[0])

    sharded_sums = jax.shard_map(
        device_sums,
        mesh=mesh,
        in_specs=(P(), P("data"), P(), P()),
        out_specs=P(),
        check_vma=False,
    )

    def step(state: TrainState, batch):
        step_seed = mix(mix(state.step), seed)
        rows = jnp.arange(batch["items"].shape[0], dtype=jnp.int32)
        shared = draw_shared(loss_config, sampler, step_seed, batch["targets"])
        (loss, tokens), grads = sharded_sums(state.params, {**batch, "row_ids": rows}, step_seed, shared)
        grads = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        one = jnp.ones((), jnp.float32)
        metrics = {
            "loss": (loss, tokens),
            "grad_norm": (optax.tree.norm(grads), one),
            "tokens": (tokens, one),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)
