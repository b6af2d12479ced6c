"""Loss and gradients of cross-entropy over the catalogue: all logits in memory, streamed, and sampled."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.timing import interleaved, peak_run
from rec_jax.data.batch import Batch
from rec_jax.hashing import row_keys
from rec_jax.objectives.catalogue import Catalogue
from rec_jax.objectives.negatives import draw_by_row, make_prior
from rec_jax.objectives.softmax import naive_softmax_cross_entropy, softmax_cross_entropy
from rec_jax.objectives.token_loss import SampledSoftmaxConfig, make_token_loss

NUM_ITEMS = (4_096, 16_384, 65_536, 262_144, 1_048_576)
SHAPE_BSD = (8, 128, 64)  # packed rows, tokens per row, dims
SAMPLED = SampledSoftmaxConfig(num_negatives=256, sharing="row")
MAX_TEMP_BYTES = 3 * 2**30  # methods that need more are not run


def measure_softmax(repeats: int, catalogues=NUM_ITEMS) -> dict:
    """Returns {"items_4096": {"full": figures, "streaming": ..., "a_fifth": ..., "sampled": ...}, ...}.

    On one device. a_fifth: streamed, where only every fifth token has a target, as with masked items.
    """
    return {f"items_{num_items}": _measure(num_items, repeats) for num_items in catalogues}


def _measure(num_items: int, repeats: int) -> dict:
    rng = np.random.default_rng(0)
    rows, length, dim = SHAPE_BSD
    x_BSD = jnp.asarray(rng.normal(size=SHAPE_BSD), jnp.float32)
    table_VD = jnp.asarray(rng.normal(size=(num_items + 1, dim)) * 0.1, jnp.float32)
    targets_BS = jnp.asarray(rng.integers(1, num_items + 1, (rows, length)), jnp.int32)
    positions_BS = jnp.broadcast_to(jnp.arange(length), (rows, length))
    batch = Batch({"item": targets_BS}, jnp.ones_like(targets_BS), positions_BS, {"item": targets_BS})
    prior = make_prior(SAMPLED, np.ones(num_items + 1))

    def exact(cross_entropy, every, x_BSD, table_VD):
        targets_T = batch.targets.reshape(-1)
        weights_T = (jnp.arange(targets_T.size) % every == 0).astype(jnp.float32)
        return cross_entropy(x_BSD.reshape(-1, dim), table_VD, targets_T, weights_T)

    def sampled(x_BSD, table_VD):
        negatives = draw_by_row(SAMPLED, prior.sampler, row_keys(0, jnp.arange(rows)), length)
        return make_token_loss(SAMPLED)(x_BSD, Catalogue(table_VD), batch, negatives, prior)

    losses = {
        "full": (partial(exact, naive_softmax_cross_entropy, 1), num_items),
        "streaming": (partial(exact, softmax_cross_entropy, 1), num_items),
        "a_fifth": (partial(exact, softmax_cross_entropy, 5), num_items / 5),
        "sampled": (sampled, SAMPLED.num_negatives + 1),
    }
    figures, runs, flops = {}, {}, {}
    for name, (loss, num_scores) in losses.items():
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x_BSD, table_VD).compile()
        temp_bytes = compiled.memory_analysis().temp_size_in_bytes
        figures[name] = {"temp_bytes": temp_bytes}
        if temp_bytes <= MAX_TEMP_BYTES:
            runs[name] = lambda compiled=compiled: jax.block_until_ready(compiled(x_BSD, table_VD))
            flops[name] = 6 * rows * length * num_scores * dim  # the backward pass is twice the forward
    run_peak, peak_flops = peak_run()
    secs = interleaved(runs | {"peak": run_peak}, repeats)
    peak = peak_flops / secs["peak"]
    for name in runs:
        rate = flops[name] / secs[name]
        figures[name] |= {
            "ms": float(1e3 * np.median(secs[name])),
            "gflops_per_sec": float(np.median(rate) / 1e9),
            "percent_of_limit": float(np.median(100 * rate / peak)),
        }
        if "full" in runs:
            figures[name]["full_over_this"] = float(np.median(secs["full"] / secs[name]))
    return figures
