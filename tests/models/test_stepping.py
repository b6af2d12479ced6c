"""Cached decoding of every causal model: one event at a time gives what the full forward pass gives."""

import jax
import jax.numpy as jnp
import numpy as np
import packed_rows
import pytest

from rec_jax.models.base import init_model
from rec_jax.models.esasrec import ESASRecConfig
from rec_jax.models.gru4rec import GRU4RecConfig
from rec_jax.models.hstu import HSTUConfig
from rec_jax.models.lru import LRUConfig
from rec_jax.models.registry import MODELS, model_builder
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.models.semantic_ids import SemanticIdsConfig, numbered_semantic_ids
from rec_jax.models.tiger import TigerConfig

NUM_ITEMS, MAX_LEN = 20, 12
ATTENTION = {"width": 8, "ff_width": 12, "num_heads": 2}
CONFIGS = [
    SASRecConfig(**ATTENTION, norm="pre", position="rotary"),
    SASRecConfig(**ATTENTION, norm="post", share_layers=True, num_layers=3, item_dim=5),
    SASRecConfig(**ATTENTION, norm="original", position="rotary", num_experts=3, l2_normalize=True),
    SASRecConfig(num_layers=0, width=8),
    ESASRecConfig(**ATTENTION, conv_width=4),
    ESASRecConfig(**ATTENTION, conv_width=1, position="learned", num_experts=3),
    HSTUConfig(width=8, num_heads=2, value_width=3),
    HSTUConfig(width=8, num_heads=1, time_bias=False),
    GRU4RecConfig(width=8, num_layers=2, hidden_width=6),
    LRUConfig(width=8, ff_width=12, conv_width=3),
    LRUConfig(width=8, ff_width=12, conv_width=0, num_layers=1),
    TigerConfig(**ATTENTION, norm="original"),
    TigerConfig(**ATTENTION, prefix_embeddings=True),
]
EVERY_MODEL = pytest.mark.parametrize("config", CONFIGS, ids=str)


def make(config):
    semantic_ids = numbered_semantic_ids(NUM_ITEMS, SemanticIdsConfig(codebook_size=3, num_levels=2))
    model, params = init_model(model_builder(config, NUM_ITEMS, MAX_LEN, semantic_ids), seed=0)
    rng = np.random.default_rng(1)  # far from their start, so that scales, biases and gates take part
    return model, jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params)


def draw(seed, length=MAX_LEN):
    rng = np.random.default_rng(seed)
    gaps = np.exp(rng.uniform(0, 12, length)).astype(np.int64)
    gaps[0] = 0
    return rng.integers(1, NUM_ITEMS + 1, length).astype(np.int32), np.cumsum(gaps).astype(np.int32)


def pack(rows):
    """Each row holds its histories, (items, times), in order, then padding."""
    items, times = ([[history[i] for history in row] for row in rows] for i in (0, 1))
    return packed_rows.pack(items, times, MAX_LEN)


class Stepper:
    def __init__(self, config):
        self.model, self.params = make(config)
        self._prefill = jax.jit(lambda *args: self.bind().prefill(*args, room=MAX_LEN))
        self._step = jax.jit(lambda *args: self.bind().step(*args))
        self._encode = jax.jit(lambda batch: self.bind()(batch))

    def bind(self):
        return self.model.bind(self.params)

    def full(self, items, times):
        """x_SD of one whole history."""
        return np.asarray(self._encode(pack([[(items, times)]])))[0, : len(items)]

    def prefill(self, rows, query_positions):
        return self._prefill(pack(rows), tuple(map(np.array, query_positions)))

    def step(self, items_BK, times_BK, cache):
        return self._step({"item": items_BK, "time": times_BK}, cache)


def cut(history, *bounds):
    return tuple(x[slice(*bounds)] for x in history)


def close(x, expected):
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_every_causal_model_is_here():
    assert {type(config) for config in CONFIGS} == {x for x in MODELS if MODELS[x].is_causal}


@EVERY_MODEL
def test_packed_histories_are_continued_up_to_max_len(config):
    """A history alone in its row, and two that share one, each followed by as many events as fit."""
    stepper, histories = Stepper(config), [draw(seed) for seed in range(3)]
    lengths, query_positions = (4, 1, 6), ([0, 1, 1], [3, 0, 6])
    starts = [cut(history, n) for history, n in zip(histories, lengths, strict=True)]
    x_ND, cache = stepper.prefill([starts[:1], starts[1:]], query_positions)
    full = [stepper.full(*history) for history in histories]
    close(x_ND, [x_SD[n - 1] for x_SD, n in zip(full, lengths, strict=True)])
    for more in range(MAX_LEN - min(lengths)):
        places = [min(n + more, MAX_LEN - 1) for n in lengths]
        new = [np.array([[h[i][p]] for h, p in zip(histories, places, strict=True)]) for i in (0, 1)]
        x_BKD, cache = stepper.step(*new, cache)
        for row, n in enumerate(lengths):
            if n + more < MAX_LEN:  # beyond it there are no positions
                close(x_BKD[row, 0], full[row][n + more])


@EVERY_MODEL
def test_continuations_fork_and_are_reordered(config):
    """Three continuations of each of two histories; then each goes on from one of the three."""
    stepper, rng = Stepper(config), np.random.default_rng(5)
    histories = [draw(seed, 8) for seed in (3, 4)]
    starts = [cut(history, n) for history, n in zip(histories, (5, 3), strict=True)]
    _, cache = stepper.prefill([[start] for start in starts], ([0, 1], [4, 2]))
    beams = [[start] * 3 for start in starts]
    parents = [np.array(x) for x in ([[0, 0, 0], [0, 0, 0]], [[2, 0, 0], [1, 1, 2]], [[1, 2, 0], [0, 2, 2]])]
    for parent_BK in parents:
        cache = cache.fork(parent_BK)
        beams = [[row[k] for k in parent] for row, parent in zip(beams, parent_BK, strict=True)]
        items_BK = rng.integers(1, NUM_ITEMS + 1, (2, 3)).astype(np.int32)
        times_BK = np.array([[times[-1] for _, times in row] for row in beams], np.int32)
        times_BK += rng.integers(0, 10**4, (2, 3)).astype(np.int32)
        x_BKD, cache = stepper.step(items_BK, times_BK, cache)
        for b, k in np.ndindex(2, 3):
            items, times = beams[b][k]
            beams[b][k] = np.append(items, items_BK[b, k]), np.append(times, times_BK[b, k])
            close(x_BKD[b, k], stepper.full(*beams[b][k])[-1])


def test_more_events_than_there_is_room_for_give_nan():
    stepper = Stepper(CONFIGS[0])
    module, (items, times) = stepper.bind(), draw(0, 2)
    _, cache = module.prefill(pack([[(items, times)]]), (np.array([0]), np.array([1])), room=1)
    x_BKD, cache = module.step({"item": np.array([[1]])}, cache)
    assert np.isfinite(x_BKD).all()
    assert np.isnan(module.step({"item": np.array([[1]])}, cache)[0]).all()
