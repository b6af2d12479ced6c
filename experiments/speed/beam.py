"""Beam search over the semantic ids of a catalogue, for one user."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.timing import interleaved
from rec_jax.data.batch import Batch
from rec_jax.models.base import init_model
from rec_jax.models.beam import generate
from rec_jax.models.semantic_ids import SemanticIds
from rec_jax.models.tiger import Tiger, TigerConfig

NUM_CODES, NUM_LEVELS = 256, 4
LENGTH = 50  # events in the history
MODEL = TigerConfig(width=128, ff_width=256, num_heads=4, num_layers=3, prefix_embeddings=True)
BEAMS = (10, 50)


def measure_beam(repeats: int, num_items: int = 10_000) -> dict:
    """Returns {"read": figures, "beams_10": ..., "beams_50": ...}, on one device.

    "read" is the model's forward pass over the history, without a search.
    """
    rng = np.random.default_rng(0)
    codes_VQ = np.zeros((num_items + 1, NUM_LEVELS), np.int32)
    paths = rng.choice(NUM_CODES ** (NUM_LEVELS - 1), num_items, replace=False)
    codes_VQ[1:, :-1] = np.stack(np.unravel_index(paths, (NUM_CODES,) * (NUM_LEVELS - 1)), axis=1)
    semantic_ids = SemanticIds(codes_VQ, NUM_CODES)
    model, params = init_model(
        lambda rngs: Tiger(MODEL, num_items, LENGTH, semantic_ids=semantic_ids, rngs=rngs), seed=0
    )
    batch = Batch(
        events={"item": jnp.asarray(rng.integers(1, num_items + 1, (1, LENGTH)), jnp.int32)},
        segments=jnp.ones((1, LENGTH), jnp.int32),
        positions=jnp.arange(LENGTH, dtype=jnp.int32)[None],
    )
    last_N = jnp.array([LENGTH - 1])
    read = jax.jit(lambda params: model.bind(params)(batch, query_positions=(jnp.array([0]), last_N)))

    def search(num_beams):
        jax.block_until_ready(generate(model, params, batch, last_N, num_beams))

    runs = {"read": lambda: jax.block_until_ready(read(params))}
    runs |= {f"beams_{num_beams}": partial(search, num_beams) for num_beams in BEAMS}
    secs = interleaved(runs, repeats)
    figures = {
        name: {
            "ms": float(1e3 * np.median(x)),
            "ms_min": float(1e3 * x.min()),
            "ms_max": float(1e3 * x.max()),
        }
        for name, x in secs.items()
    }
    return figures | {"items": num_items, "history": LENGTH, "levels": NUM_LEVELS, "codes": NUM_CODES}
