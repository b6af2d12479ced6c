"""Distillation losses, compared with their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.data.batch import Batch
from rec_jax.objectives import distill
from rec_jax.objectives.distill import DistillConfig, distill_sum, similarity_sum, soft_cross_entropy
from rec_jax.objectives.negatives import Negatives, UniformSampler

B, S, V = 3, 5, 11


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def logits(x, table):
    scores = x @ table.T
    scores[..., 0] = -1e30
    return scores


@pytest.fixture
def models():
    """(x_BSD, table_VD, hidden) of a student of width 4 and of teachers of widths 6 and 3."""
    rng = np.random.default_rng(0)
    models = []
    for width in (4, 6, 3):
        arrays = [rng.normal(size=shape).astype(np.float32) for shape in [(B, S, width), (V, width)]]
        hidden = [rng.normal(size=(B, S, width)).astype(np.float32) for _ in range(2)]
        models.append((*arrays, hidden))
    return models


@pytest.fixture
def batch():
    targets = np.random.default_rng(1).integers(1, V, (B, S)).astype(np.int32)
    targets[0, 3:] = 0
    ones = np.ones((B, S), np.int32)
    return Batch({}, ones, ones, {"item": targets})


def divergence(probs, log_probs):
    return np.where(probs > 0, probs * (np.log(np.maximum(probs, 1e-30)) - log_probs), 0).sum(-1)


# All tokens in one tile, and two tokens per tile.
@pytest.mark.parametrize("tile, temperature", [(distill.TILE_ELEMENTS, 2.5), (2 * V, 1.0), (2 * V, 2.5)])
def test_the_divergence_from_the_mean_of_two_teachers(models, batch, temperature, tile, monkeypatch):
    monkeypatch.setattr(distill, "TILE_ELEMENTS", tile)
    config = DistillConfig(weight=0.25, temperature=temperature)
    probs = np.mean([softmax(logits(x, table) / temperature) for x, table, _ in models[1:]], axis=0)
    log_probs = np.log(np.maximum(softmax(logits(*models[0][:2]) / temperature), 1e-30))
    real = batch.targets > 0
    distill_loss = (divergence(probs, log_probs) * real).sum() * temperature**2
    own = np.log(np.maximum(softmax(logits(*models[0][:2])), 1e-30))
    own = -(np.take_along_axis(own, batch.targets[..., None], -1)[..., 0])[real].sum()
    loss = jax.jit(lambda: distill_sum(config, None, models[0], models[1:], batch, None))()
    np.testing.assert_allclose(loss, 0.75 * own + 0.25 * distill_loss, rtol=1e-5)


def test_a_student_equal_to_its_teacher_has_loss_zero(models, batch):
    config, teacher = DistillConfig(weight=1.0), models[1]

    @jax.jit
    def losses(teacher, batch, drawn):
        return [distill_sum(config, 3.0, teacher, [teacher], batch, x) for x in (None, drawn)]

    np.testing.assert_allclose(losses(teacher, batch, draw(batch)), 0, atol=1e-5)


@pytest.mark.parametrize("ranked, share, temperature", [(None, 1.0, 2.0), (3, 0.6, 2.0), (None, 0.6, 1.0)])
def test_gradients_equal_those_of_the_formula(models, ranked, share, temperature):
    (x, table, _), *teachers = models
    weights = np.array([1.0, 0.0, 2.0] * S, np.float32)
    targets = np.random.default_rng(3).integers(1, V, B * S)
    targets[1] = 0  # padding, of weight 0
    flat = [(x.reshape(B * S, -1), table) for x, table, _ in teachers]
    transform = None if ranked is None else (lambda probs: distill._first_ranked(ranked, probs))

    def naive(x_TD, table_VD):
        probs = sum(jax.nn.softmax(distill._logits(*teacher) / temperature) for teacher in flat) / 2
        probs = probs if transform is None else transform(probs)
        scores = distill._logits(x_TD, table_VD)
        log_probs = jax.nn.log_softmax(scores / temperature)
        terms = jnp.where(probs > 0, probs * (jnp.log(jnp.maximum(probs, 1e-30)) - log_probs), 0)
        own = jnp.take_along_axis(jax.nn.log_softmax(scores), targets[:, None], 1)[:, 0]
        losses = share * temperature**2 * jnp.sum(terms, -1) - (1 - share) * own
        return 3.0 * jnp.sum(weights * losses)

    def tiled(x_TD, table_VD):
        options = (share, transform, temperature)
        return 3.0 * soft_cross_entropy(x_TD, table_VD, flat, targets, weights, *options)

    @jax.jit
    def both(x_TD, table_VD):
        return [jax.value_and_grad(loss, (0, 1))(x_TD, table_VD) for loss in (naive, tiled)]

    expected, actual = both(x.reshape(B * S, -1), table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), actual, expected)
    assert np.all(actual[1][1][0] == 0)  # the padding entry gets no gradient


def test_a_ranking_gives_decreasing_weights_to_its_first_items():
    probs = np.array([[0.0, 0.1, 0.4, 0.2, 0.3]], np.float32)
    weights = np.exp(-np.array([0, 1]) / 1.0)
    expected = np.zeros((1, 5))
    expected[0, [2, 4]] = weights / weights.sum()
    np.testing.assert_allclose(distill._first_ranked(2, jnp.asarray(probs)), expected, rtol=1e-6)
    assert distill._first_ranked(10, jnp.asarray(probs))[0, 0] == 0  # padding is never ranked


def draw(batch):
    ids = jnp.asarray(np.random.default_rng(2).integers(1, V, (B, 1, 4)).astype(np.int32))
    return Negatives.of(ids, UniformSampler(V - 1))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_sampled_loss_compares_the_target_and_its_negatives(models, batch, temperature):
    negatives = draw(batch)
    scores = []
    for x, table, _ in models[:2]:
        all_scores = x @ table.T / temperature
        candidates = np.zeros((B, S, 5))
        for b in range(B):
            for s in range(S):
                target = batch.targets[b, s]
                candidates[b, s, 0] = all_scores[b, s, target]
                for k, item in enumerate(np.asarray(negatives.ids_BSK)[b, 0]):
                    candidates[b, s, k + 1] = all_scores[b, s, item] + np.log((V - 1) / 4)
                    if item == target:
                        candidates[b, s, k + 1] = -1e30
        scores.append(candidates)
    log_probs = np.log(np.maximum(softmax(scores[0]), 1e-30))
    expected = (divergence(softmax(scores[1]), log_probs) * (batch.targets > 0)).sum() * temperature**2
    config = DistillConfig(weight=1.0, temperature=temperature)
    loss = distill_sum(config, 5.0, models[0], models[1:2], batch, negatives)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_similarities_of_real_tokens_do_not_depend_on_width(models, batch):
    real = batch.targets > 0

    def cosines(x):
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return np.einsum("bsd,btd->bst", unit, unit)

    pairs = real[:, :, None] & real[:, None, :]
    student, teacher = models[0][2], models[1][2]

    def difference(a, b):
        squares = (cosines(a) - cosines(b)) ** 2
        return sum(squares[row][pairs[row]].mean() * real[row].sum() for row in range(B))

    expected = np.mean([difference(a, b) for a, b in zip(student, teacher, strict=True)])
    np.testing.assert_allclose(similarity_sum(student, teacher, real), expected, rtol=1e-4)
    one = difference(student[1], teacher[1])
    np.testing.assert_allclose(similarity_sum(student[1:], teacher, real), one, rtol=1e-4)  # last with last
    deep = similarity_sum([student[0]] * 4, teacher, real)
    expected = (3 * difference(student[0], teacher[0]) + difference(student[0], teacher[1])) / 4
    np.testing.assert_allclose(
        deep, expected, rtol=1e-4
    )  # only the last of 4 layers matches the teacher's last
    rotated = [x @ np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0] for x in student]
    np.testing.assert_allclose(similarity_sum(rotated, student, real), 0, atol=1e-6)


def test_invalid_configs_are_refused():
    for field, value in {"weight": 1.5, "temperature": 0.0, "num_ranked": 0, "hidden_weight": -1.0}.items():
        with pytest.raises(ValueError, match=f"{field}={value}"):
            DistillConfig(**{field: value})
