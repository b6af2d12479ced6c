import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from rec_jax.hashing import mix, row_keys
from rec_jax.objectives.negatives import make_sampler

COUNTS = np.array([99, 0, 1, 10, 50, 3])  # entry 0 is padding; item 1 is unseen
KEYS = row_keys(jnp.uint32(0), jnp.arange(100))


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_draws_follow_the_stated_probabilities(kind):
    sampler = make_sampler(kind, COUNTS)
    draws = np.asarray(sampler.draw(KEYS, (200,))).ravel()
    expected = np.full(5, 0.2) if kind == "uniform" else np.array([1, 1, 10, 50, 3]) / 65
    np.testing.assert_allclose(np.exp(sampler.log_prob(jnp.arange(1, 6))), expected, rtol=1e-6)
    counts = np.bincount(draws, minlength=6)
    assert counts[0] == 0
    assert chisquare(counts[1:], expected * 20_000).pvalue > 1e-3


@pytest.mark.parametrize("num_items", [2, 7, 1000])
def test_draws_of_rows_positions_and_steps_are_independent(num_items):
    """Compares neighbouring draws of one row, of neighbouring rows and of consecutive steps."""
    sampler = make_sampler("uniform", np.ones(num_items + 1))
    steps = [row_keys(mix(jnp.uint32(step)), jnp.arange(100)) for step in (0, 1)]
    first, second = (np.asarray(sampler.draw(key_B, (40, 10))) - 1 for key_B in steps)
    pairs = [(first[:, :-1], first[:, 1:]), (first[:, :, :-1], first[:, :, 1:]), (first[:-1], first[1:])]
    groups = 2 if num_items == 2 else 7
    for a, b in [*pairs, (first, second)]:
        counts = np.bincount((a % groups * groups + b % groups).ravel(), minlength=groups**2)
        share = np.bincount(np.arange(num_items) % groups, minlength=groups) / num_items
        assert chisquare(counts, np.outer(share, share).ravel() * a.size).pvalue > 1e-4


def test_alias_table_is_exact_for_a_long_tail():
    counts = np.concatenate([[0], 1000 / np.arange(1, 500)])
    sampler = make_sampler("popularity", counts)
    accept, alias = np.asarray(sampler.accept_V, np.float64), np.asarray(sampler.alias_V)
    probs = accept / len(accept)
    np.add.at(probs, alias, (1 - accept) / len(accept))
    np.testing.assert_allclose(probs, np.exp(sampler.log_prob_V[1:]), rtol=1e-4)


def test_unknown_samplers_and_empty_catalogues_are_refused():
    with pytest.raises(ValueError, match="sampler='zipf'"):
        make_sampler("zipf", COUNTS)
    with pytest.raises(ValueError, match="empty"):
        make_sampler("uniform", np.array([0]))
