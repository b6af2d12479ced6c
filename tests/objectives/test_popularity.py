"""Losses with popularity weights and biases, compared with the formulas token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_runs import NO_LAYERS, assert_close, reference, run
from test_token_loss import BATCH, NUM_ITEMS, TABLE, FixedSampler, X, compute, softplus, sum_over_tokens

from rec_jax.objectives.negatives import make_prior, propensity_weights
from rec_jax.objectives.softmax import naive_softmax_cross_entropy
from rec_jax.objectives.token_loss import BCEConfig, GBCEConfig, SampledSoftmaxConfig, SoftmaxConfig

COUNTS = np.array([0, 0, 1, 4, 16, 2, 8, 64, 4, 1])
BIAS = np.log(np.maximum(COUNTS, 1) / np.maximum(COUNTS, 1)[1:].mean())  # log-popularity


def loss_of(config, negatives=()):
    """The loss of the batch of test_token_loss."""
    prior = make_prior(config, COUNTS)
    if len(negatives):
        prior = dataclasses.replace(prior, sampler=FixedSampler(negatives))
    return compute(config, None, prior=prior)


def test_weights_by_hand():
    # Counts divided by the largest: 1, 1/4, 1/16; to the power of -1/2: 1, 2, 4.
    counts = np.array([9, 16, 4, 1, 0])
    mean = (16 * 1 + 4 * 2 + 1 * 4) / 21
    np.testing.assert_allclose(propensity_weights(counts, 0.5, 100)[1:] * mean, [1, 2, 4, 4], rtol=1e-6)
    mean = (16 * 1 + 4 * 2 + 1 * 3) / 21  # clipped to 3
    np.testing.assert_allclose(propensity_weights(counts, 0.5, 3)[1:] * mean, [1, 2, 3, 3], rtol=1e-6)


def test_the_loss_of_a_token_is_multiplied_by_its_weight():
    config = SoftmaxConfig(ips_power=0.5)
    weights = propensity_weights(COUNTS, 0.5, 100)
    expected = sum_over_tokens(lambda s, y: weights[y] * (np.log(np.sum(np.exp(s[1:]))) - s[y]))
    assert loss_of(config) == pytest.approx(expected, rel=1e-5)
    config = BCEConfig(num_negatives=1, sharing="position", ips_power=0.5)
    expected = sum_over_tokens(lambda s, y: weights[y] * (softplus(-s[y]) + softplus(s[9])))
    assert loss_of(config, [9]) == pytest.approx(expected, rel=1e-5)


def test_discounted_scores_by_hand():
    tau = 0.5
    expected = sum_over_tokens(
        lambda s, y: np.log(np.sum(np.exp((s + tau * BIAS)[1:]))) - s[y] - tau * BIAS[y]
    )
    assert loss_of(SoftmaxConfig(popularity_discount=tau)) == pytest.approx(expected, rel=1e-5)

    def sampled(s, y):
        s = s + tau * BIAS
        z = np.exp(s[y]) + (np.exp(s[8]) + np.exp(s[9])) / (2 / NUM_ITEMS)
        return np.log(z) - s[y]

    config = SampledSoftmaxConfig(num_negatives=2, popularity_discount=tau)
    assert loss_of(config, [8, 9]) == pytest.approx(sum_over_tokens(sampled), rel=1e-5)
    config = BCEConfig(num_negatives=1, popularity_discount=tau)
    expected = sum_over_tokens(lambda s, y: softplus(-s[y] - tau * BIAS[y]) + softplus(s[9] + tau * BIAS[9]))
    assert loss_of(config, [9]) == pytest.approx(expected, rel=1e-5)


def test_gradients_of_a_discounted_softmax_equal_the_naive_ones():
    config = SoftmaxConfig(popularity_discount=1.5, ips_power=1.0)
    prior = make_prior(config, COUNTS)
    weights_T = jnp.where(BATCH.targets > 0, prior.weight_V[BATCH.targets], 0).reshape(-1)

    def naive(x, table):
        wide = jnp.concatenate([table, 1.5 * BIAS[:, None]], axis=1)
        x = jnp.pad(x.reshape(-1, x.shape[-1]), ((0, 0), (0, 1)), constant_values=1)
        return naive_softmax_cross_entropy(x, wide, BATCH.targets.reshape(-1), weights_T)

    def tiled(x, table):
        return compute(config, None, x, table, prior=prior)

    @jax.jit
    def both(x, table):
        return [jax.grad(loss, (0, 1))(x, table) for loss in (tiled, naive)]

    for a, b in zip(*both(X, TABLE), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


SAMPLED = GBCEConfig(num_negatives=5, ips_power=0.5, popularity_discount=1.0)


def test_steps_are_the_same_on_a_mesh_with_sparse_updates():
    dense = reference(SAMPLED, model=NO_LAYERS)
    assert_close(run(SAMPLED, 2, 2, table="sgd", model=NO_LAYERS), dense)


def test_a_softmax_over_a_row_sharded_table_is_the_same():
    exact = SoftmaxConfig(ips_power=0.5, popularity_discount=1.0)
    sharded = run(exact, 2, 4, model_axis=2, layout="rows", model=NO_LAYERS)
    assert_close(sharded, reference(exact, model=NO_LAYERS))


@pytest.mark.parametrize("field, value", [("ips_power", -1.0), ("ips_clip", 0.5)])
def test_invalid_configs_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        SoftmaxConfig(**{field: value})
