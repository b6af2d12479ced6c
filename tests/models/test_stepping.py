"""Cached decoding of every causal model: adding one event at a time equals the full forward pass."""

import functools

import jax
import numpy as np
import packed_rows
import pytest

from rec_jax.models.base import define_model
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
LRU = LRUConfig(width=8, ff_width=12, conv_width=3)
CONFIGS = [
    SASRecConfig(num_layers=0, width=8),
    SASRecConfig(**ATTENTION, norm="post", share_layers=True, item_dim=5),
    SASRecConfig(**ATTENTION, norm="original", position="rotary", num_experts=3, l2_normalize=True),
    ESASRecConfig(**ATTENTION, conv_width=4, position="learned", num_experts=3),
    HSTUConfig(width=8, num_heads=2, value_width=3),
    HSTUConfig(width=8, num_heads=1, num_layers=1, time_bias=False),
    GRU4RecConfig(width=8, num_layers=2, hidden_width=6),
    LRU,
    LRUConfig(width=8, ff_width=12, conv_width=1, num_layers=1),
    TigerConfig(**ATTENTION, norm="original", num_layers=1),
    TigerConfig(**ATTENTION, prefix_embeddings=True),
]
EVERY_MODEL = pytest.mark.parametrize("config", CONFIGS, ids=str)


def draw(seed, length=MAX_LEN):
    """Returns a history: (items, seconds since its first event)."""
    rng = np.random.default_rng(seed)
    gaps = np.exp(rng.uniform(0, 12, length)).astype(np.int64)
    gaps[0] = 0
    return rng.integers(1, NUM_ITEMS + 1, length).astype(np.int32), np.cumsum(gaps).astype(np.int32)


def pack(rows):
    """Each row holds its histories, (items, times), in order, then padding."""
    items, times = ([[history[i] for history in row] for row in rows] for i in (0, 1))
    return packed_rows.pack(items, times, MAX_LEN)


class Stepper:
    """The compiled functions of a model with random parameters."""

    def __init__(self, config):
        semantic_ids = numbered_semantic_ids(NUM_ITEMS, SemanticIdsConfig(codebook_size=3, num_levels=2))
        self.model = define_model(model_builder(config, NUM_ITEMS, MAX_LEN, semantic_ids))
        self.params = packed_rows.random_params(self.model)
        self._prefill = jax.jit(lambda *args: self.bind().prefill(*args, room=MAX_LEN))
        self._step = jax.jit(lambda *args: self.bind().step(*args))
        self._encode = jax.jit(lambda batch: self.bind()(batch))

    def bind(self):
        return self.model.bind(jax.tree.map(jax.numpy.asarray, self.params))

    def full(self, items, times):
        """Returns x_SD of one whole history."""
        return np.asarray(self._encode(pack([[(items, times)]])))[0, : len(items)]

    def prefill(self, rows, query_positions):
        return self._prefill(pack(rows), tuple(map(np.array, query_positions)))

    def step(self, items_BK, times_BK, cache):
        return self._step({"item": items_BK, "time": times_BK}, cache)


stepper_of = functools.cache(Stepper)  # tests of one config share its programs


def cut(history, *bounds):
    return tuple(x[slice(*bounds)] for x in history)


def assert_close(x, expected):
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_every_causal_model_is_tested():
    assert {type(config) for config in CONFIGS} == {x for x in MODELS if MODELS[x].is_causal}


@EVERY_MODEL
def test_packed_histories_are_continued_up_to_max_len(config):
    """One history alone in its row and two that share a row are each followed by as many events as fit."""
    stepper, histories = stepper_of(config), [draw(seed) for seed in range(3)]
    lengths, query_positions = (4, 1, 6), ([0, 1, 1], [3, 0, 6])
    starts = [cut(history, n) for history, n in zip(histories, lengths, strict=True)]
    x_ND, cache = stepper.prefill([starts[:1], starts[1:]], query_positions)
    full = [stepper.full(*history) for history in histories]
    assert_close(x_ND, [x_SD[n - 1] for x_SD, n in zip(full, lengths, strict=True)])
    for added in range(MAX_LEN - min(lengths)):
        positions = [min(n + added, MAX_LEN - 1) for n in lengths]
        new = [np.array([[h[i][p]] for h, p in zip(histories, positions, strict=True)]) for i in (0, 1)]
        x_BKD, cache = stepper.step(*new, cache)
        for row, n in enumerate(lengths):
            if n + added < MAX_LEN:  # beyond max_len there are no positions
                assert_close(x_BKD[row, 0], full[row][n + added])


@EVERY_MODEL
def test_continuations_are_forked_and_reordered(config):
    """Each of three histories gets three continuations; then each continuation extends any of the three."""
    stepper, rng = stepper_of(config), np.random.default_rng(5)
    starts = [cut(draw(seed), n) for seed, n in ((3, 5), (4, 3), (5, 2))]
    _, cache = stepper.prefill([starts[:2], starts[2:]], ([0, 0, 1], [4, 7, 1]))
    beams = [[start] * 3 for start in starts]
    for parents in (
        [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[2, 0, 0], [1, 1, 2], [0, 1, 2]],
        [[1, 2, 0], [0, 2, 2], [2, 1, 1]],
    ):
        cache = cache.fork(np.array(parents))
        beams = [[row[k] for k in parent] for row, parent in zip(beams, parents, strict=True)]
        items_BK = rng.integers(1, NUM_ITEMS + 1, (3, 3)).astype(np.int32)
        times_BK = np.array([[times[-1] for _, times in row] for row in beams], np.int32)
        times_BK += rng.integers(0, 10**4, (3, 3)).astype(np.int32)
        x_BKD, cache = stepper.step(items_BK, times_BK, cache)
        x_BKD = np.asarray(x_BKD)
        for b, k in np.ndindex(3, 3):
            items, times = beams[b][k]
            beams[b][k] = np.append(items, items_BK[b, k]), np.append(times, times_BK[b, k])
            assert_close(x_BKD[b, k], stepper.full(*beams[b][k])[-1])


def test_more_events_than_the_cache_has_room_for_give_nan():
    stepper = stepper_of(LRU)  # has no positions, so histories may be longer than max_len
    _, cache = stepper.prefill([[draw(0, 4)], [draw(1, 1), draw(2, 6)]], ([0, 1, 1], [3, 0, 6]))
    for _ in range(MAX_LEN):
        x_BKD, cache = stepper.step(np.ones((3, 1), np.int32), np.zeros((3, 1), np.int32), cache)
        assert np.isfinite(x_BKD).all()
    x_BKD, _ = stepper.step(np.ones((3, 1), np.int32), np.zeros((3, 1), np.int32), cache)
    assert np.isnan(x_BKD).all()
