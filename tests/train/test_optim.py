import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rec_jax.train.optim import OptimConfig, make_optimizer, make_schedule

PARAMS = {"up": {"kernel": jnp.array([2.0, -4.0]), "bias": jnp.array([1.0])}}


def first_update(params=PARAMS, grads=None, **kwargs):
    """Returns the first update of the parameters."""
    optimizer = make_optimizer(OptimConfig(**kwargs), params, 10)
    grads = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
    return optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.mark.parametrize(
    "kwargs, expected",  # rates at steps 0, 5, 10, 20, 30 and 40 of a run of 30 steps
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_steps": 10}, [0, 0.5, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup_steps": 10}, [0, 0.5, 1, 0.5, 0, 0]),
        ({"schedule": "linear", "final_rate": 0.2}, [1, 13 / 15, 11 / 15, 7 / 15, 0.2, 0.2]),
        ({"schedule": "cosine", "warmup_steps": 10}, [0, 0.5, 1, 0.5, 0, 0]),
        ({"schedule": "cosine", "warmup_steps": 10, "final_rate": 0.1}, [0, 0.5, 1, 0.55, 0.1, 0.1]),
    ],
)
def test_schedules(kwargs, expected):
    schedule = make_schedule(OptimConfig(learning_rate=3.0, **kwargs), 30)
    values = [float(schedule(step)) / 3 for step in (0, 5, 10, 20, 30, 40)]
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)


def test_a_warm_up_may_be_longer_than_the_run():
    schedule = make_schedule(OptimConfig(learning_rate=1.0, schedule="cosine", warmup_steps=100), 10)
    assert float(schedule(9)) == pytest.approx(0.09)


def test_only_matching_parameters_decay():
    update = first_update(type="adamw", learning_rate=0.5, weight_decay=0.1)
    np.testing.assert_allclose(update["up"]["kernel"], [-0.1, 0.2], rtol=1e-6)
    assert update["up"]["bias"] == 0
    update = first_update(type="adamw", learning_rate=0.5, weight_decay=0.1, weight_decay_names=".*/bias")
    assert np.all(update["up"]["kernel"] == 0) and update["up"]["bias"] == pytest.approx(-0.05)


def test_a_regex_that_matches_no_parameter_lists_their_names():
    with pytest.raises(ValueError, match="weight_decay_names='table' matches no.*up/kernel"):
        first_update(type="adamw", weight_decay=0.1, weight_decay_names="table")


@pytest.mark.parametrize(
    "kind, expected",
    [("sgd", -0.3), ("adam", -0.1), ("adamw", -0.1), ("adagrad", -0.1 * 3 / np.sqrt(9 + 0.1))],
)
def test_first_step_of_each_optimizer(kind, expected):
    grads = jax.tree.map(lambda x: jnp.full_like(x, 3.0), PARAMS)
    update = first_update(grads=grads, type=kind, learning_rate=0.1)
    np.testing.assert_allclose(update["up"]["bias"], [expected], rtol=1e-5)


def test_adam_follows_its_formula():
    """Three steps with non-default betas, compared with NumPy."""
    config = OptimConfig(learning_rate=0.1, b1=0.8, b2=0.9, eps=1e-3)
    params, grads = {"w": jnp.array([1.0, -2.0])}, np.array([[0.5, 2.0], [-1.0, 0.1], [0.3, 0.3]])
    optimizer = make_optimizer(config, params, 10)
    state = optimizer.init(params)
    w, m, v = np.array([1.0, -2.0]), 0, 0
    for t, g in enumerate(grads, 1):
        updates, state = optimizer.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w = w - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 needs type='adamw', not 'adam'"),
        ({"weight_decay": -0.1, "type": "adamw"}, "weight_decay=-0.1"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"final_rate": -0.1}, "final_rate=-0.1"),
    ],
)
def test_invalid_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**kwargs)
