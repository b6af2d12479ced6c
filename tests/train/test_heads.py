"""Losses of first dims and of later items, against one loss each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_runs import LENGTH, NO_LAYERS, NUM_ITEMS, assert_close, make_batch, run

from rec_jax.data.datasets import DataConfig
from rec_jax.experiment import ExperimentConfig
from rec_jax.models.base import get_table, init_model, with_table
from rec_jax.models.bert4rec import BERT4RecConfig
from rec_jax.models.registry import model_builder
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.train.heads import shifted, sum_over_heads
from rec_jax.train.losses import LossConfig, loss_sum

D = 8
CONFIG = SASRecConfig(width=D, ff_width=8, num_layers=0, num_future=3)
RNG = np.random.default_rng(0)
BATCH = {name: jnp.asarray(x) for name, x in make_batch(rows=3).items()}
X = jnp.asarray(RNG.normal(size=(*BATCH["items"].shape, D)), jnp.float32)


def make(**fields):
    config = dataclasses.replace(CONFIG, **fields)
    model, params = init_model(model_builder(config, NUM_ITEMS, LENGTH), seed=0)
    table_VD = np.random.default_rng(1).normal(size=get_table(params).shape)
    params = with_table(params, jnp.asarray(table_VD, jnp.float32))
    return model.bind(params)


def slow_loss(queries_BSD, table_VD, ahead=0):
    """Cross-entropy token by token, of the target `ahead` places further on in the same segment."""
    batch, total = jax.tree.map(np.asarray, BATCH), 0.0
    rows, length = batch.events["item"].shape
    for row in range(rows):
        for place in range(length - ahead):
            segment = batch.segments[row, place]
            if segment == 0 or batch.segments[row, place + ahead] != segment:
                continue
            scores = np.asarray(table_VD, np.float64)[1:] @ np.asarray(queries_BSD[row, place], np.float64)
            total += np.log(np.exp(scores).sum()) - scores[batch.next["item"][row, place + ahead] - 1]
    return total


def fast_loss(config, module, x_BSD, table_VD):
    def loss_of(x, table, batch):
        return loss_sum(config, None, x, table, batch, None)

    return jax.jit(lambda x, table: sum_over_heads(config, module, loss_of, x, table, BATCH))(x_BSD, table_VD)


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_the_loss_of_first_dims_is_that_of_smaller_vectors(l2_normalize):
    module = make(l2_normalize=l2_normalize, temperature=0.5, num_future=1)
    queries, items = module.queries(X), module.item_vectors()
    expected = []
    for dims in (2, 5, D):
        x, table = X[..., :dims], module.items.embedding[...][:, :dims]
        if l2_normalize:
            x, table = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, table))
        expected.append(slow_loss(x / 0.5, table))
    config = LossConfig(matryoshka=(2, 5))
    loss, count = fast_loss(config, module, queries, items)
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert count == np.sum(np.asarray(BATCH["targets"]) > 0)


def test_shifted_targets_by_hand():
    batch = {
        "targets": jnp.array([[1, 2, 3, 4, 5, 6, 0]]),
        "target_weights": jnp.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.0]]),
        "segments": jnp.array([[1, 1, 1, 2, 2, 3, 0]]),
        "items": jnp.arange(7)[None],
    }
    once, twice = shifted(batch, 1), shifted(batch, 2)
    np.testing.assert_array_equal(once["targets"], [[2, 3, 0, 5, 0, 0, 0]])
    np.testing.assert_allclose(once["target_weights"], [[0.2, 0.3, 0, 0.5, 0, 0, 0]])
    np.testing.assert_array_equal(twice["targets"], [[3, 0, 0, 0, 0, 0, 0]])
    assert once["items"] is batch.events["item"]


def test_heads_ask_for_later_items_of_the_same_history():
    module = make()
    kernels = RNG.normal(size=(2, D, D)).astype(np.float32) / 4
    for head, kernel in zip(module.future, kernels, strict=True):
        head.kernel[...] = jnp.asarray(kernel)
    table = module.item_vectors()
    expected = slow_loss(X, table)
    for ahead in (1, 2):
        expected += 0.5 * slow_loss(X + X @ kernels[ahead - 1], table, ahead)
    loss, count = fast_loss(LossConfig(future_weight=0.5), module, X, table)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert count == np.sum(np.asarray(BATCH["targets"]) > 0)


def test_the_first_head_is_the_model_without_the_others():
    plain, ahead = make(num_future=1), make()
    np.testing.assert_array_equal(plain(BATCH), ahead(BATCH))  # and starts from the same numbers
    np.testing.assert_array_equal(ahead.ahead(X, 1), X)  # a head starts as the first


ALL = LossConfig(
    type="sampled_softmax", num_negatives=5, ips_power=0.5, matryoshka=(4,), exclude_history=True
)


def test_all_at_once_on_a_mesh_and_with_touched_rows():
    fields = (*NO_LAYERS, ("num_future", 2))
    dense = run(ALL, steps=2, model=fields)
    assert np.any(dense[1]["future"][0]["kernel"] != 0)
    assert_close(run(ALL, 2, 2, steps=2, model=fields, table="sgd"), dense)


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"loss": LossConfig(matryoshka=(4, 8)), "model": CONFIG},
            r"matryoshka=\(4, 8\) must be below the 8",
        ),
        ({"model": BERT4RecConfig(num_future=2)}, "num_future=2: type='bert4rec'"),
        ({"model": CONFIG, "data": DataConfig(max_len=2)}, "num_future=3 must be at most data.max_len=2"),
    ],
)
def test_configs_that_do_not_go_together(sections, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(**sections)


def test_mistakes_in_the_loss():
    for fields in ({"matryoshka": (8, 4)}, {"matryoshka": (0,)}, {"future_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            LossConfig(**fields)
