"""A run of a linear model, for tests of the training loop, in this process or as a script.

`python toy_run.py WORKDIR JSON` calls `run` with the keyword arguments in JSON, and prints the digest of the
final state.
"""

import contextlib
import dataclasses
import functools
import json
import sys
import time
import zlib
from unittest import mock

import grain
import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.train.checkpoint import SaveError
from rec_jax.train.loop import TrainConfig, TrainingData, Validation, fit
from rec_jax.train.monitor import Monitor

STEPS_PER_EPOCH = 7


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyState:
    step: jax.Array
    params: dict
    opt_state: dict


def init(width: int = 4) -> ToyState:
    return ToyState(
        jnp.zeros((), jnp.int32),
        {"w": jnp.linspace(0.0, 1.0, width), "b": jnp.zeros(())},
        {"m": jnp.zeros(width)},
    )


@functools.cache
def make_step(nan_at: int = -1, nan_params_at: int = -1):
    """Returns a step whose loss (or parameters only) become NaN at a 0-based step."""

    def step(state, batch):
        def loss_fn(params):
            error = batch["x"] @ params["w"] + params["b"] - batch["y"]
            return jnp.sum(error**2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        loss = jnp.where(state.step == nan_at, jnp.nan, loss)
        m = 0.9 * state.opt_state["m"] + grads["w"]
        w = state.params["w"] - 0.04 / m.size * m
        w = jnp.where(state.step == nan_params_at, jnp.nan, w)
        params = {"w": w, "b": state.params["b"] - 0.04 / m.size * grads["b"]}
        count = jnp.float32(batch["y"].size)
        metrics = {"loss": (loss, count), "tokens": (count, jnp.float32(1))}
        return ToyState(state.step + 1, params, {"m": m}), metrics

    return jax.jit(step, donate_argnums=0)


class ToySource:
    """A data source whose batches depend on the step only."""

    def __init__(self, num_steps: int, width: int = 4):
        self._num_steps, self._width = num_steps, width

    def __len__(self):
        return self._num_steps

    def __getitem__(self, step):
        x = np.random.default_rng(int(step)).normal(size=(3, self._width)).astype(np.float32)
        return {"x": x, "y": x.sum(axis=1)}


def batches(num_steps: int, width: int = 4):
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(ToySource(num_steps, width)).to_iter_dataset(options))


def evaluate(params) -> dict:
    error = float(jnp.abs(params["w"] - 1).mean())
    return {"ndcg@10": 1 / (1 + error), "error": error}


def run(
    workdir,
    *,
    step=None,
    evaluate_fn=evaluate,
    settings=None,
    pause=0.0,
    width=4,
    eval_from=0.0,
    on_best=None,
    plots=False,  # drawing takes longer than the training
    **fields,
):
    """Calls `fit`. pause: seconds to wait in each step. fields: of TrainConfig."""
    defaults = {"epochs": 4, "log_every_steps": 3, "checkpoint_every_steps": 5}
    config = TrainConfig(**defaults | fields)
    step = step or make_step()

    def paused_step(state, batch):
        time.sleep(pause)
        return step(state, batch)

    with contextlib.nullcontext() if plots else mock.patch.object(Monitor, "plot"):
        return fit(
            init(width),
            paused_step if pause else step,
            TrainingData(batches(config.epochs * STEPS_PER_EPOCH, width), STEPS_PER_EPOCH),
            Validation(evaluate_fn, begin=eval_from),
            config=config,
            workdir=workdir,
            run_info={"config": {"train": dataclasses.asdict(config), **(settings or {})}, "split": "abc"},
            learning_rate=lambda step: 0.04 / (step + 1),
            on_best=on_best,
        )


def digest(state) -> int:
    return zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)))


if __name__ == "__main__":
    try:
        result = run(sys.argv[1], **json.loads(sys.argv[2]))
    except SaveError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"digest": digest(result.state), "best_step": result.best_step}))
