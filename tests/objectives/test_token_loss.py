import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.data.batch import Batch
from rec_jax.hashing import row_keys
from rec_jax.objectives.catalogue import Catalogue
from rec_jax.objectives.negatives import ItemPrior, draw_by_row, draw_shared, make_sampler
from rec_jax.objectives.token_loss import (
    BCEConfig,
    GBCEConfig,
    SampledSoftmaxConfig,
    SoftmaxConfig,
    gbce_beta,
    is_sampled,
    make_token_loss,
)

NUM_ITEMS, D = 9, 4
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.normal(size=(NUM_ITEMS + 1, D)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(2, 3, D)), jnp.float32)
BATCH = Batch(
    events={"item": jnp.array([[1, 2, 3], [4, 5, 0]])},
    next={"item": jnp.array([[2, 3, 6], [5, 7, 0]])},
    segments=jnp.array([[1, 1, 1], [1, 1, 0]]),
    positions=jnp.array([[0, 1, 2], [0, 1, 0]]),
)
SEED, KEYS = jnp.uint32(5), row_keys(jnp.uint32(5), jnp.arange(2))
UNIFORM = make_sampler("uniform", np.ones(NUM_ITEMS + 1))


@jax.tree_util.register_static
class FixedSampler:
    """A sampler that always draws the given negatives."""

    def __init__(self, negatives, log_prob=UNIFORM.log_prob):
        self.negatives, self.log_prob, self.num_items = jnp.asarray(negatives), log_prob, NUM_ITEMS

    def draw(self, key_B, shape):
        return jnp.broadcast_to(self.negatives, (len(key_B), *shape))


def softplus(x):
    return np.log1p(np.exp(x))


TOKENS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]  # (row, column) of the real tokens


def token_scores(row, column):
    """The scores of all items for a token, in NumPy."""
    return np.asarray(TABLE, np.float64) @ np.asarray(X, np.float64)[row, column]


def sum_over_tokens(token_loss):
    """Sums token_loss(scores of all items, target) over the real tokens."""
    targets_BS = np.asarray(BATCH.targets)
    return sum(token_loss(token_scores(*token), targets_BS[token]) for token in TOKENS)


def compute(config, sampler, x=X, table=TABLE, prior=None):
    """The loss of BATCH. sampler: used if there is no prior."""
    return _compute(config, x, table, prior or ItemPrior(sampler))


@functools.partial(jax.jit, static_argnums=0)
def _compute(config, x, table, prior):
    negatives = None
    if is_sampled(config) and config.sharing == "batch":
        negatives = draw_shared(config, prior.sampler, SEED, BATCH.targets)
    elif is_sampled(config):
        negatives = draw_by_row(config, prior.sampler, KEYS, X.shape[1])
    return make_token_loss(config)(x, Catalogue(table), BATCH, negatives, prior)


def test_bce_with_one_negative():
    config = BCEConfig(num_negatives=1, sharing="position")
    expected = sum_over_tokens(lambda s, y: softplus(-s[y]) + softplus(s[9]))
    assert compute(config, FixedSampler([9])) == pytest.approx(expected, rel=1e-5)


def test_bce_starts_where_positives_and_negatives_balance():
    config = BCEConfig(num_negatives=2, sharing="row")
    prior = np.log(1 / 2)
    expected = sum_over_tokens(
        lambda s, y: softplus(-s[y] - prior) + softplus(s[8] + prior) + softplus(s[9] + prior)
    )
    assert compute(config, FixedSampler([8, 9])) == pytest.approx(expected, rel=1e-5)


def test_gbce_raises_the_probability_of_the_positive_to_beta():
    # K = 2 of V - 1 = 8: alpha = 1/4, beta = 1/4 * (0.5 * (1 - 4) + 4) = 0.625.
    assert gbce_beta(2, NUM_ITEMS, 0.5) == pytest.approx(0.625)
    assert gbce_beta(2, NUM_ITEMS, 0.0) == 1 and gbce_beta(2, NUM_ITEMS, 1.0) == pytest.approx(0.25)
    config = GBCEConfig(num_negatives=2, calibration=0.5)
    prior = np.log(0.625 / 2)
    expected = sum_over_tokens(
        lambda s, y: 0.625 * softplus(-s[y] - prior) + softplus(s[8] + prior) + softplus(s[9] + prior)
    )
    assert compute(config, FixedSampler([8, 9])) == pytest.approx(expected, rel=1e-5)


def test_sampled_softmax_by_hand():
    config = SampledSoftmaxConfig(num_negatives=2)
    log_prob = jnp.log(jnp.arange(10) / 45.0)

    def token(s, y):
        z = np.exp(s[y]) + np.exp(s[8]) / (2 * 8 / 45) + np.exp(s[9]) / (2 * 9 / 45)
        return np.log(z) - s[y]

    assert compute(config, FixedSampler([8, 9], lambda ids: log_prob[ids])) == pytest.approx(
        sum_over_tokens(token), rel=1e-5
    )


@pytest.mark.parametrize("sampler", ["uniform", "popularity"])
def test_sampled_softmax_approaches_the_exact_softmax(sampler):
    """The estimate of the partition function is unbiased for every sampler."""
    exact = float(compute(SoftmaxConfig(), None))
    counts = np.array([0, 1, 1, 2, 3, 5, 8, 13, 21, 34])
    config = SampledSoftmaxConfig(num_negatives=20_000)
    assert compute(config, make_sampler(sampler, counts)) == pytest.approx(exact, rel=1e-2)


def test_a_negative_equal_to_the_target_is_left_out():
    config = SampledSoftmaxConfig(num_negatives=2)

    def token(s, y):
        others = [np.exp(s[v]) / (2 / NUM_ITEMS) for v in (6, 9) if v != y]
        return np.log(np.exp(s[y]) + sum(others)) - s[y]

    assert compute(config, FixedSampler([6, 9])) == pytest.approx(sum_over_tokens(token), rel=1e-5)


def test_exclude_history_drops_negatives_of_the_own_segment():
    config = BCEConfig(num_negatives=2, sharing="row", exclude_history=True)
    prior = np.log(1 / 2)
    # Item 1 is an input of row 0, and item 7 a target of row 1: each is left out only in that row.
    expected, targets_BS = 0.0, np.asarray(BATCH.targets)
    for row, column in TOKENS:
        s, negative = token_scores(row, column), (7, 1)[row]
        expected += softplus(-s[targets_BS[row, column]] - prior) + softplus(s[negative] + prior)
    assert compute(config, FixedSampler([1, 7])) == pytest.approx(expected, rel=1e-5)


LOSS_TYPES = {"bce": BCEConfig, "gbce": GBCEConfig, "sampled_softmax": SampledSoftmaxConfig}


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_sharing_does_not_change_the_result_for_equal_negatives(loss):
    def objective(sharing, x, table):
        config = LOSS_TYPES[loss](num_negatives=3, sharing=sharing)
        return compute(config, FixedSampler([1, 8, 9]), x, table)

    @jax.jit
    def results(x, table):
        loss_and_grads = jax.value_and_grad(objective, (1, 2))
        return [loss_and_grads(sharing, x, table) for sharing in ("batch", "row", "position")]

    expected, *others = results(X, TABLE)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), other, expected)


def test_in_batch_draws_targets_of_the_batch_by_frequency():
    config = SampledSoftmaxConfig(num_negatives=5000, sampler="in_batch", sharing="batch")
    targets = jnp.array([[2, 2, 0], [5, 7, 0]])
    drawn = draw_shared(config, UNIFORM, SEED, targets).ids_BSK
    share = np.bincount(np.asarray(drawn).ravel(), minlength=8) / 5000
    np.testing.assert_allclose(share, [0, 0, 0.5, 0, 0, 0.25, 0, 0.25], atol=0.03)


def test_rows_and_positions_draw_differently():
    for sharing, shape in [("row", (2, 1, 4)), ("position", (2, 3, 4))]:
        config = BCEConfig(num_negatives=4, sharing=sharing)
        drawn = np.asarray(draw_by_row(config, UNIFORM, KEYS, 3).ids_BSK)
        assert drawn.shape == shape
        assert len({tuple(ids) for ids in drawn.reshape(-1, 4)}) == shape[0] * shape[1]
        swapped = np.asarray(draw_by_row(config, UNIFORM, KEYS[::-1], 3).ids_BSK)
        np.testing.assert_array_equal(swapped, drawn[::-1])  # draws depend on the row's key only


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_negatives": 0}, "num_negatives=0"),
        ({"calibration": 1.5}, "calibration=1.5"),
        ({"sampler": "in_batch"}, "sharing='row'"),
    ],
)
def test_invalid_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GBCEConfig(**kwargs)
