"""Matryoshka and multi-token losses, compared with a separate loss for each prefix and each head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_runs import LENGTH, NO_LAYERS, NUM_ITEMS, assert_close, make_batch, run

from rec_jax.data.batch import Batch
from rec_jax.data.datasets import DataConfig
from rec_jax.experiment import ExperimentConfig
from rec_jax.models.base import init_model
from rec_jax.models.bert4rec import BERT4RecConfig
from rec_jax.models.registry import model_builder
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.objectives.negatives import make_prior
from rec_jax.objectives.objective import Fixed, Objective, StepContext
from rec_jax.objectives.token_loss import SampledSoftmaxConfig, SoftmaxConfig
from rec_jax.train.precision import PrecisionConfig
from rec_jax.tree import with_leaf

D = 8
CONFIG = SASRecConfig(width=D, ff_width=8, num_layers=0, num_future=3)
RNG = np.random.default_rng(0)
BATCH = jax.tree.map(jnp.asarray, make_batch(rows=3))
X = jnp.asarray(RNG.normal(size=(*BATCH.items.shape, D)), jnp.float32)


def make(**fields):
    config = dataclasses.replace(CONFIG, **fields)
    model, params = init_model(model_builder(config, NUM_ITEMS, LENGTH), seed=0)
    table_VD = np.random.default_rng(1).normal(size=params["items"]["embedding"].shape)
    return model, with_leaf(params, "items/embedding", jnp.asarray(table_VD, jnp.float32))


def expected_loss(queries_BSD, table_VD, ahead=0):
    """The cross-entropy in NumPy of the targets `ahead` positions later in the same segment."""
    batch, total = jax.tree.map(np.asarray, BATCH), 0.0
    queries_BSD, table_VD = np.asarray(queries_BSD, np.float64), np.asarray(table_VD, np.float64)
    rows, length = batch.items.shape
    for row in range(rows):
        for column in range(length - ahead):
            segment = batch.segments[row, column]
            if segment == 0 or batch.segments[row, column + ahead] != segment:
                continue
            scores = table_VD[1:] @ queries_BSD[row, column]
            total += np.log(np.exp(scores).sum()) - scores[batch.targets[row, column + ahead] - 1]
    return total


def objective_loss(config, model, params, x_BSD):
    context = StepContext(jnp.int32(0), jnp.uint32(0), Fixed(make_prior(config, np.ones(NUM_ITEMS + 1))))
    score = Objective(model, config, PrecisionConfig()).score
    return jax.jit(lambda params, x: score(params, x, [], BATCH, None, context))(params, x_BSD)


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_matryoshka_averages_the_losses_of_smaller_vectors(l2_normalize):
    model, params = make(l2_normalize=l2_normalize, temperature=0.5, num_future=1)
    module, expected = model.bind(params), []
    for dims in (2, 5, D):
        x, table = X[..., :dims], module.items.embedding[...][:, :dims]
        if l2_normalize:
            x, table = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, table))
        expected.append(expected_loss(x / 0.5, table))
    config = SoftmaxConfig(matryoshka=(2, 5))
    loss = objective_loss(config, model, params, module.queries(X))
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)


def test_shifted_targets_by_hand():
    batch = Batch(
        events={"item": jnp.arange(7)[None]},
        next={"item": jnp.array([[1, 2, 3, 4, 5, 6, 0]])},
        segments=jnp.array([[1, 1, 1, 2, 2, 3, 0]]),
        positions=jnp.array([[0, 1, 2, 0, 1, 0, 0]]),
        weights=jnp.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.0]]),
    )
    once, twice = batch.shift_targets(1), batch.shift_targets(2)
    np.testing.assert_array_equal(once.targets, [[2, 3, 0, 5, 0, 0, 0]])
    np.testing.assert_allclose(once.weights, [[0.2, 0.3, 0, 0.5, 0, 0, 0]])
    np.testing.assert_array_equal(twice.targets, [[3, 0, 0, 0, 0, 0, 0]])
    assert once.items is batch.items


def test_heads_predict_later_items_of_the_same_segment():
    model, params = make()
    kernels = RNG.normal(size=(2, D, D)).astype(np.float32) / 4
    params["future"] = {index: {"kernel": jnp.asarray(kernel)} for index, kernel in enumerate(kernels)}
    table = params["items"]["embedding"]
    expected = expected_loss(X, table)
    for ahead in (1, 2):
        expected += 0.5 * expected_loss(X + X @ kernels[ahead - 1], table, ahead)
    loss = objective_loss(SoftmaxConfig(future_weight=0.5), model, params, X)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_heads_do_not_change_the_model_and_start_equal_to_the_first():
    single, multi = (model.bind(params) for model, params in (make(num_future=1), make()))
    np.testing.assert_array_equal(single(BATCH), multi(BATCH))
    np.testing.assert_array_equal(multi.ahead(X, 1), X)


COMBINED = SampledSoftmaxConfig(num_negatives=5, ips_power=0.5, matryoshka=(4,), exclude_history=True)


def test_matryoshka_and_heads_are_the_same_on_a_mesh_with_sparse_updates():
    fields = (*NO_LAYERS, ("num_future", 2))
    dense = run(COMBINED, steps=2, model=fields)
    assert np.any(dense[1]["future"][0]["kernel"] != 0)
    assert_close(run(COMBINED, 2, 2, steps=2, model=fields, table="sgd"), dense)


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"loss": SoftmaxConfig(matryoshka=(4, 8)), "model": CONFIG},
            r"matryoshka=\(4, 8\) must hold only sizes below the 8 dims",
        ),
        (
            {"model": BERT4RecConfig(num_future=2)},
            "num_future=2 is for models that predict the next item.*'bert4rec'",
        ),
        ({"model": CONFIG, "data": DataConfig(max_len=2)}, "num_future=3 must be at most data.max_len=2"),
    ],
)
def test_unsupported_combinations_are_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(**sections)


def test_invalid_configs_are_refused():
    for fields in ({"matryoshka": (8, 4)}, {"matryoshka": (0,)}, {"future_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            SoftmaxConfig(**fields)
