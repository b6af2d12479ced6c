"""Dropout masks, tested with statistics that detect a poor hash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.hashing import mix, row_keys
from rec_jax.nn.dropout import dropout

ROWS, SHAPE = 24, (50, 16)
NUM = 50 * 16


def keys(seed=0, rows=ROWS):
    return row_keys(jnp.uint32(seed), jnp.arange(rows))


def masks(seed=0, site=0, rate=0.5, rows=ROWS):
    """bool[rows, NUM]: True where dropout keeps an element."""
    kept = dropout(jnp.ones((rows, *SHAPE)), keys(seed, rows), site, rate)
    return np.asarray(kept).reshape(rows, NUM) > 0


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_share_of_zeros_and_scale_of_kept_values(rate):
    out = np.asarray(dropout(jnp.full((200, *SHAPE), 2.0), keys(7, 200), 3, rate))
    zeros = np.mean(out == 0)
    assert abs(zeros - rate) < 4 * np.sqrt(rate * (1 - rate) / out.size)
    np.testing.assert_allclose(out[out != 0], 2 / (1 - rate), rtol=1e-6)


def test_rate_zero_keeps_all_values():
    np.testing.assert_array_equal(dropout(jnp.ones((ROWS, *SHAPE)), keys(), 0, 0.0), 1)


def test_mask_of_a_row_does_not_depend_on_the_batch():
    whole = masks()
    x = jnp.ones((ROWS, *SHAPE))
    for rows in (np.arange(ROWS)[::-1], np.array([5])):
        key_B = row_keys(jnp.uint32(0), jnp.asarray(rows))
        part = np.asarray(dropout(x[: len(rows)], key_B, 0, 0.5)).reshape(len(rows), NUM) > 0
        np.testing.assert_array_equal(part, whole[rows])


def test_backward_pass_uses_the_same_mask():
    x, weight = np.random.default_rng(0).normal(size=(2, ROWS, *SHAPE)).astype(np.float32)
    x += 10
    out, grad = jax.value_and_grad(lambda x: jnp.sum(dropout(x, keys(), 2, 0.3) * weight))(x)
    expected = np.where(np.asarray(dropout(x, keys(), 2, 0.3)) != 0, weight / 0.7, 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)
    assert out == pytest.approx(float(np.sum(expected * np.asarray(x))), rel=1e-3)


def test_bf16_stays_bf16_and_has_the_mask_of_f32():
    out = dropout(jnp.ones((ROWS, *SHAPE), jnp.bfloat16), keys(), 0, 0.5)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32).reshape(ROWS, NUM) > 0, masks())


def worst_z(bits):
    """Returns the largest |z| of masks bool[M, n] of rate 1/2. The statistics are the sum of each mask, the
    sum of each position over masks, the correlation of each pair of masks, and autocorrelations at distances
    at which a hash of the position could repeat."""
    signs = bits * 2.0 - 1
    num_masks, n = signs.shape
    pairs = (signs @ signs.T)[np.triu_indices(num_masks, 1)] / np.sqrt(n)
    lags = [np.sum(signs[:, lag:] * signs[:, :-lag], 1) / np.sqrt(n - lag) for lag in (1, 2, 16, 32, 256)]
    zs = [signs.sum(1) / np.sqrt(n), signs.sum(0) / np.sqrt(num_masks), pairs, *lags]
    return max(np.abs(z).max() for z in zs)


def many_masks():
    """Masks of consecutive rows, sites and steps."""
    seeds = [mix(jnp.uint32(step)) for step in (0, 1)]
    return np.concatenate([masks(seed, site) for seed in seeds for site in (0, 1, 2)])


def test_rows_sites_steps_and_positions_are_independent():
    # About 12,000 z values: the largest is expected near 4, and exceeds 5.5 for one hash in 2,000.
    assert worst_z(many_masks()) < 5.5


@pytest.mark.parametrize("flaw", ["rate", "same row", "opposite row", "same position", "period"])
def test_statistics_detect_flaws(flaw):
    bits = np.random.default_rng(0).random((144, NUM)) < 0.5
    assert worst_z(bits) < 5.5
    if flaw == "rate":
        bits |= np.random.default_rng(1).random(bits.shape) < 0.02
        bits[3] |= np.random.default_rng(2).random(NUM) < 0.25
    elif flaw == "same row":
        bits[100, : NUM // 2] = bits[7, : NUM // 2]
    elif flaw == "opposite row":
        bits[1] = ~bits[0]
    elif flaw == "same position":
        bits[:, 5] = True
    else:
        bits[9, 256:512] = bits[9, :256]
    assert worst_z(bits) > 5.5
