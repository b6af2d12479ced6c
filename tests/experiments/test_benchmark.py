"""The benchmark compares functions that compute the same, and its figures are what their names say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.speed import beam, embedding, models, sharding, softmax, timing, training
from experiments.speed.lengths import LENGTHS, synthetic_histories
from rec_jax.data.histories import leave_one_out


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    """The matrix product that measures the limit takes no time."""
    monkeypatch.setattr(timing, "_PEAK_SIZE", 64)


@pytest.fixture
def short(monkeypatch):
    """Few users and short timings, on synthetic lengths."""
    monkeypatch.delenv("REC_JAX_DATA", raising=False)
    monkeypatch.setattr(training, "NUM_USERS", 16)
    monkeypatch.setattr(training, "NUM_BATCHES", 2)
    monkeypatch.setattr(training, "BLOCK_SECS", 0.01)


def test_both_training_steps_compute_the_same_loss(short):
    figures = training.measure_training("beauty", repeats=1)
    assert figures["loss_difference"] < 1e-5
    assert figures["lengths"] == "synthetic"
    assert figures["ratio"] == pytest.approx(
        figures["ours_tokens_per_sec"] / figures["naive_tokens_per_sec"], rel=1e-6
    )
    assert figures["fill"] > 0.9 > 0.3 > figures["naive_fill"]


def test_useful_flops_of_a_history_by_hand():
    # One token: 4 * 2 * 2 projections, 2 * 2 * 3 feed-forward, 2 * 2 * 1 attention, 2 * 2 scores; times 6.
    config = training.SASRecConfig(width=2, ff_width=3, num_layers=1, num_heads=1)
    assert training.useful_flops_per_token(config, np.array([1])) == 6 * (16 + 12 + 4 + 4)


@pytest.mark.parametrize("name", LENGTHS)
def test_synthetic_lengths_have_the_fill_of_the_real_ones(name):
    lengths = LENGTHS[name]
    histories = synthetic_histories(lengths)
    split = leave_one_out(histories)
    targets = np.clip(split.train_end - histories.offsets[:-1] - 1, 0, lengths.max_len)
    assert targets.mean() / lengths.max_len == pytest.approx({"ml1m": 0.54, "beauty": 0.115}[name], rel=0.05)


def test_every_softmax_is_timed_unless_too_large(monkeypatch):
    monkeypatch.setattr(softmax, "MAX_TEMP_BYTES", 20_000_000)
    small, large = softmax.measure_softmax(repeats=1, catalogues=(512, 40_000)).values()
    assert {"ms", "full_over_this"} <= set(small["full"]) and small["full"]["full_over_this"] == 1
    assert set(large["full"]) == {"temp_bytes"} and "ms" in large["streaming"]
    assert large["full"]["temp_bytes"] > 1024 * 40_000 * 4 > large["streaming"]["temp_bytes"]


def test_every_table_update_is_timed_unless_too_large(monkeypatch):
    monkeypatch.setattr(embedding, "NUM_LOOKUPS", 64)
    monkeypatch.setattr(embedding, "MAX_BYTES", 3.5 * 4 * 5000 * 8)
    result = embedding.measure_embedding(repeats=1, num_rows=(1000, 5000), dims=(8,))
    small, large = result["rows_1000_dim_8"], result["rows_5000_dim_8"]
    for name in embedding.METHODS:
        assert small[f"{name}_ms"] > 0
        assert (f"{name}_ms" in large) == (not name.startswith("dense"))
    assert small["rowwise_adagrad_over_dense_adam"] > 0 and result["copy_gbytes_per_sec"] > 0
    assert large["sgd_temp_bytes"] < 5000 * 8 * 4 < small["dense_adam_temp_bytes"] * 10


def test_bytes_of_collectives_by_hand():
    hlo = """
      %a = f32[8,4]{1,0} all-reduce(%x), channel_id=1
      %b = (s32[1,2]{1,0}, s32[1,2]{1,0}) all-to-all(%y, %z), channel_id=2
      %c = f32[2]{0} reduce-scatter(%w), dimensions={0}
      %d = f32[8,4]{1,0} add(%a, %a)
      %e = pred[] all-reduce(%p), to_apply=%max
    """
    assert sharding.collective_bytes(hlo, num_devices=4) == {
        "all-reduce": 2 * 3 * 128 // 4 + 2,  # 1.5 bytes of the bool round to 2
        "all-to-all": 3 * 16 // 4,
        "reduce-scatter": 3 * 8,
    }


def test_the_exchange_reads_the_same_and_sends_less_than_a_quarter_of_plain_indexing(monkeypatch):
    monkeypatch.setattr(sharding, "NUM_ROWS", 50_000)
    monkeypatch.setattr(sharding, "NUM_LOOKUPS", 4096)
    figures = sharding.measure_sharding(repeats=1)
    assert figures["ours"]["gather_bytes_over_this"] > 4
    assert "all-gather" not in figures["ours"]["bytes_by_kind"]
    assert figures["gather"]["bytes_by_kind"]["all-reduce"] >= 4096 * 64 * 4


def test_functions_alternate_after_one_call_for_compilation():
    calls = []
    secs = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert "".join(calls) == "ab" + "abab"
    assert {name: len(values) for name, values in secs.items()} == {"a": 2, "b": 2}


def test_multiply_adds_of_loops_and_products_by_hand():
    def products(a_34, b_45):
        def body(carry, _):
            return carry @ jnp.ones((5, 5)), None

        return jax.lax.scan(body, jax.jit(jnp.matmul)(a_34, b_45), None, length=7)[0]

    jaxpr = jax.make_jaxpr(products)(jnp.ones((3, 4)), jnp.ones((4, 5))).jaxpr
    assert models.multiply_adds(jaxpr) == 3 * 4 * 5 + 7 * 3 * 5 * 5


def test_models_are_timed_relative_to_sasrec(monkeypatch):
    monkeypatch.setattr(models, "NUM_ITEMS", 20)
    monkeypatch.setattr(models, "ROWS", 1)
    monkeypatch.setattr(models, "LENGTH", 8)
    monkeypatch.setattr(
        models, "MODELS", [config for config in models.MODELS if config.type in ("lru", "sasrec")]
    )
    monkeypatch.setattr(models, "SIZES", {"width": 4, "ff_width": 4, "num_layers": 1})
    result = models.measure_models(repeats=1)
    assert result["sasrec"]["time_over_sasrec_at_equal_work"] == 1 and result["lru"]["multiply_adds"] > 0
    assert set(models.measure_lengths(1, lengths=(4,), tokens=8)["lru"]) == {"4"}


def test_a_search_takes_longer_with_more_beams_and_than_reading_alone(monkeypatch):
    monkeypatch.setattr(beam, "MODEL", beam.TigerConfig(width=8, ff_width=8, num_heads=1, num_layers=1))
    monkeypatch.setattr(beam, "LENGTH", 6)
    monkeypatch.setattr(beam, "BEAMS", (2, 2000))
    result = beam.measure_beam(repeats=3, num_items=3000)
    assert result["beams_2000"]["ms_min"] > result["beams_2"]["ms_min"] > 0
    assert result["beams_2000"]["ms_min"] > result["read"]["ms_min"] > 0
    assert result["items"] == 3000
