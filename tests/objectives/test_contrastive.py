"""The contrastive loss, compared with NumPy sums over pairs of histories."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_runs import LENGTH, NO_LAYERS, NUM_ITEMS, assert_close, make_batch, reference, run

from rec_jax.hashing import mix
from rec_jax.models.base import init_model
from rec_jax.models.bert4rec import BERT4RecConfig
from rec_jax.models.registry import model_builder
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.objectives.augment import AugmentConfig
from rec_jax.objectives.contrastive import ContrastiveConfig, contrastive_sum
from rec_jax.objectives.negatives import make_prior
from rec_jax.objectives.objective import Fixed, Objective, StepContext
from rec_jax.objectives.token_loss import BCEConfig, SoftmaxConfig
from rec_jax.run_config import ExperimentConfig
from rec_jax.train.precision import PrecisionConfig

ROWS = 4
MODEL, PARAMS = init_model(
    model_builder(SASRecConfig(width=8, ff_width=8, num_layers=1, dropout=0.3), NUM_ITEMS, LENGTH), seed=0
)
BATCH = make_batch(seed=1, rows=ROWS).replace(row_ids=np.arange(ROWS, dtype=np.int32))
BATCH = BATCH.with_targets((BATCH.targets + 3) // 4)  # so that histories share targets
SEED = jnp.uint32(9)
KEYS = mix(SEED, jnp.arange(ROWS))


@jax.jit
def encode(batch, key_B):
    return MODEL.bind(PARAMS)(batch, key_B)


@functools.cache
def loss_of(config):
    return jax.jit(functools.partial(contrastive_sum, config, encode))


def last_tokens(segments_BS):
    """{(row, segment): column of its last token}, of a batch or a view."""
    columns = {}
    for (row, column), segment in np.ndenumerate(np.asarray(segments_BS)):
        if segment:
            columns[row, int(segment)] = column
    return columns


def expected_loss(config, first, second):
    """The loss in NumPy. first, second: (x_BSD, segments) of the two views."""
    columns = last_tokens(BATCH.segments)
    names = [name for name in columns if BATCH.positions[name[0], columns[name]] > 0]  # two tokens or more
    z, owner, target = [], [], []
    for x, segments_BS in (first, second):
        view_columns, x = last_tokens(segments_BS), np.asarray(x, np.float64)
        for name in names:
            vector = x[name[0], view_columns[name]]
            z.append(vector / np.linalg.norm(vector))
            owner.append(name)
            target.append(BATCH.targets[name[0], columns[name]])
    total = 0.0
    for i in range(len(z)):
        scores = {j: z[i] @ z[j] / config.temperature for j in range(len(z)) if j != i}
        log_sum = np.log(sum(np.exp(s) for s in scores.values()))
        positives = [
            j for j in scores if owner[j] == owner[i] or (config.same_target and target[j] == target[i])
        ]
        total += np.mean([log_sum - scores[j] for j in positives])
    assert len(names) >= 4
    return config.weight * total / 2


@pytest.mark.parametrize("same_target", [False, True])
def test_dropout_views(same_target):
    config = ContrastiveConfig(weight=0.7, temperature=0.5, same_target=same_target)
    x_BSD = encode(BATCH, KEYS)
    other = encode(BATCH, mix(KEYS, 1))
    expected = expected_loss(config, *((x, BATCH.segments) for x in (x_BSD, other)))
    assert loss_of(config)(x_BSD, BATCH, KEYS) == pytest.approx(expected, rel=1e-4)


def test_augmented_views():
    config = ContrastiveConfig(weight=1.0, view="augment")
    objective = Objective(MODEL, SoftmaxConfig(), PrecisionConfig(), contrastive=config)
    context = StepContext(jnp.int32(0), SEED, Fixed(make_prior(SoftmaxConfig(), np.ones(9))))
    batch = jax.jit(objective.prepare)(BATCH, context)
    np.testing.assert_array_equal(batch.items, BATCH.items)  # the model's own loss uses the original batch
    pairs = []
    for i, view in enumerate(batch.views):
        pairs.append((encode(view, mix(KEYS, 1 + i)), view.segments))
    assert np.any(pairs[0][1] != pairs[1][1])  # cropped differently
    expected = expected_loss(config, *pairs)
    assert loss_of(config)(None, batch, KEYS) == pytest.approx(expected, rel=1e-4)


def test_a_single_history_has_loss_zero():
    config = ContrastiveConfig(weight=0.7, temperature=0.5)
    batch = BATCH.keep((BATCH.segments == 1) & (np.arange(ROWS)[:, None] == 0))
    assert batch.positions.max() > 0
    assert loss_of(config)(encode(batch, KEYS), batch, KEYS) == pytest.approx(0, abs=1e-5)


AUGMENTED = ContrastiveConfig(weight=0.5, view="augment")


def test_a_step_adds_the_loss_with_dense_and_sparse_updates():
    """Uses one device and one micro-batch, because the negatives come from one micro-batch."""
    dense = run("sampled", steps=2, model=NO_LAYERS, contrastive=AUGMENTED)
    assert dense[0][0] > reference("sampled", model=NO_LAYERS)[0][0]
    assert_close(run("sampled", steps=2, model=NO_LAYERS, table="sgd", contrastive=AUGMENTED), dense)


def test_the_loss_is_finite_on_a_mesh():
    dropout = dataclasses.replace(AUGMENTED, view="dropout", same_target=True)
    losses, _, norms = run("softmax", 2, 2, steps=1, model=NO_LAYERS, contrastive=dropout)
    assert np.isfinite(losses + norms).all()


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": BERT4RecConfig(), "augment": AugmentConfig(mask=0.1)}, "'bert4rec' predicts masked items"),
        ({"model": SASRecConfig(dropout=0.0), "contrastive": ContrastiveConfig(weight=1.0)}, "model.dropout"),
    ],
)
def test_unsupported_combinations_are_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(loss=BCEConfig(), **sections)


def test_invalid_configs_are_refused():
    for fields in (
        {"weight": -1.0},
        {"temperature": 0.0},
        {"view": "augment", "augment": AugmentConfig()},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            ContrastiveConfig(**fields)
