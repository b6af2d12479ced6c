"""Time of a training step: every sequence model relative to SASRec, and its growth with history length."""

import jax
import numpy as np

from configs import common
from experiments.speed.timing import interleaved
from rec_jax.compress.work import multiply_adds
from rec_jax.config import build, to_config_dict
from rec_jax.data.batch import Batch
from rec_jax.mesh import MeshConfig, make_mesh, place_batch
from rec_jax.models.base import init_model
from rec_jax.models.registry import MODELS, model_builder
from rec_jax.objectives.token_loss import SampledSoftmaxConfig
from rec_jax.run_config import ExperimentConfig
from rec_jax.training import make_step

NUM_ITEMS = 3_416
SIZES = {"width": 128, "ff_width": 128, "num_layers": 2, "num_heads": 2, "dropout": 0.3}
ROWS, LENGTH = 32, 200
LENGTHS, TOKENS = (512, 1024, 2048, 4096, 8192), 8192


def measure_models(repeats: int) -> dict:
    """Returns {model: ms of a step, its multiply-adds, and both relative to SASRec's}.

    A step has ROWS full rows of LENGTH events, on one device, with the exact softmax over NUM_ITEMS.
    """
    steps = {config.type: _make_step(config, LENGTH, ROWS, SIZES) for config in MODELS}
    secs = interleaved({name: step for name, (step, _) in steps.items()}, repeats)
    work = {name: multiply_adds for name, (_, multiply_adds) in steps.items()}
    return {
        name: {
            "ms": float(np.median(secs[name]) * 1e3),
            "multiply_adds": work[name],
            "time_over_sasrec": float(np.median(secs[name] / secs["sasrec"])),
            "work_over_sasrec": work[name] / work["sasrec"],
            "time_over_sasrec_at_equal_work": float(
                np.median(secs[name] / secs["sasrec"]) * work["sasrec"] / work[name]
            ),
        }
        for name in steps
    }


def measure_lengths(repeats: int, lengths=LENGTHS, tokens: int = TOKENS) -> dict:
    """Returns {model: {length: ms of a step over `tokens` tokens}} for the recurrence and SASRec.

    With 64 dims and 256 sampled negatives, so that the softmax does not dominate.
    """
    result = {}
    for config in MODELS:
        if config.type not in ("lru", "sasrec"):
            continue
        sizes = SIZES | {"width": 64, "ff_width": 64, "num_heads": 1}
        runs = {n: _make_step(config, n, tokens // n, sizes, sampled=True)[0] for n in lengths}
        secs = interleaved(runs, repeats)
        result[config.type] = {str(n): float(np.median(secs[n]) * 1e3) for n in lengths}
    return result


def _make_step(config_class, length: int, rows: int, sizes: dict, sampled: bool = False):
    """Returns (function that runs one training step and waits for it, multiply-adds of the step)."""
    cfg = common.base()
    cfg.data.max_len = length
    cfg.model = to_config_dict(config_class())
    cfg.model.update({name: value for name, value in sizes.items() if name in cfg.model})
    if "time_bias" in cfg.model:
        cfg.model.time_bias = False
    if sampled:
        cfg.loss = to_config_dict(SampledSoftmaxConfig())
    # As in the configs: rows that fit a core's cache, except GRU4Rec, whose products have one token per row.
    micro_rows = rows if config_class.type == "gru4rec" else max(1, min(rows, 800 // length))
    cfg.train.batch_rows, cfg.train.micro_rows = rows, micro_rows
    mesh = make_mesh(MeshConfig(data=1))
    config = build(ExperimentConfig, cfg)
    model, params = init_model(model_builder(config.model, NUM_ITEMS, length), config.seed)
    step = make_step(config, model, np.ones(NUM_ITEMS + 1), mesh)
    rng = np.random.default_rng(0)
    items = rng.integers(1, NUM_ITEMS + 1, (2, rows, length), dtype=np.int32)
    shape = (rows, length)
    batch = Batch(
        events={"item": items[0]},
        next={"item": items[1]},
        segments=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
    )
    batch = place_batch(batch, mesh)
    state = step.init(params)
    work = multiply_adds(jax.make_jaxpr(step)(state, batch).jaxpr)
    latest = [state]

    def run():
        latest[0], _ = step(latest[0], batch)
        jax.block_until_ready(latest[0])

    return run, work
