"""Experts against loops over tokens and experts."""

from functools import cache, partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.models.base import Model
from rec_jax.models.esasrec import SwiGLU
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.nn.blocks import FeedForward
from rec_jax.nn.context import Context
from rec_jax.nn.experts import Experts, balance

WIDTH, FF_WIDTH, ROWS, LENGTH = 6, 10, 3, 8
REAL = np.arange(LENGTH) < np.array([[8], [5], [0]])  # full, padded at the end, only padding


def define(build) -> Model:
    graphdef, state = nnx.split(build(nnx.Rngs(0)), nnx.Param)
    return Model(graphdef, nnx.to_pure_dict(state))


@cache
def make(num=4, per_token=2, factor=1.0, is_gated=False):
    config = SASRecConfig(
        width=WIDTH, ff_width=FF_WIDTH, num_experts=num, experts_per_token=per_token, capacity_factor=factor,
        balance_weight=0.5, activation="silu",
    )  # fmt: skip
    mixture = config.block_shape(is_causal=True).mixture
    model = define(lambda rngs: Experts(WIDTH, FF_WIDTH, "silu", mixture, is_gated=is_gated, rngs=rngs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), model.abstract_params)
    return config, model, params


def inputs(seed=1):
    return np.float32(np.random.default_rng(seed).normal(size=(ROWS, LENGTH, WIDTH)))


@partial(jax.jit, static_argnums=0)
def train(model, params, x_BSD, real_BS):
    """Returns (y_BSD, penalty_B)."""
    return model.bind(params).in_training(x_BSD, real_BS)


@partial(jax.jit, static_argnums=0)
def infer(model, params, x_BSD):
    return model.bind(params)(x_BSD, Context(None))[0]


def reference(config, params, x_BSD, real_BS, capacity, is_gated=False):
    """Returns (y_BSD, penalty_B) in f64, by a loop over tokens and their choices."""
    p = jax.tree.map(np.float64, params)
    y_BSD, penalty_B = np.zeros(x_BSD.shape), np.zeros(len(x_BSD))
    for row, x_SD in enumerate(np.float64(x_BSD)):
        taken, chosen, total = np.zeros(config.num_experts), np.zeros(config.num_experts), 0.0
        for s in np.flatnonzero(real_BS[row]):
            logits = x_SD[s] @ p["router_kernel"]
            probs = np.exp(logits) / np.exp(logits).sum()
            choices = np.argsort(-probs)[: config.experts_per_token]
            gates = probs[choices] / (probs[choices].sum() if config.experts_per_token > 1 else 1)
            total = total + probs
            for e, gate in zip(choices, gates, strict=True):
                chosen[e] += 1
                if taken[e] >= capacity:
                    continue
                taken[e] += 1
                up = x_SD[s] @ p["up_kernel"][e] + p["up_bias"][e]
                silu = up[:FF_WIDTH] / (1 + np.exp(-up[:FF_WIDTH]))
                hidden = silu * up[FF_WIDTH:] if is_gated else silu
                y_BSD[row, s] += gate * (hidden @ p["down_kernel"][e] + p["down_bias"][e])
        if real_BS[row].any():
            shares, num_real = chosen / chosen.sum(), real_BS[row].sum()
            row_balance = config.num_experts * np.sum(shares * total / num_real)
            penalty_B[row] = config.balance_weight * num_real * row_balance
    return y_BSD, penalty_B


# Capacities: 2 * 8 / 4 * 0.5 = 2; 8 / 3 * 0.4 = 1.07, so 2; all.
@pytest.mark.parametrize(
    "num, per_token, factor, is_gated, capacity",
    [(4, 2, 0.5, False, 2), (3, 1, 0.4, True, 2), (4, 2, 9, False, 8)],
)
def test_equals_the_loops(num, per_token, factor, is_gated, capacity):
    config, model, params = make(num, per_token, factor, is_gated)
    x_BSD = inputs()
    y_BSD, penalty_B = train(model, params, x_BSD, REAL)
    expected, penalties = reference(config, params, x_BSD, REAL, capacity, is_gated)
    np.testing.assert_allclose(y_BSD, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(penalty_B, penalties, rtol=1e-5)
    whole = reference(config, params, x_BSD, np.ones_like(REAL), LENGTH, is_gated)[0]
    np.testing.assert_allclose(infer(model, params, x_BSD), whole, rtol=1e-4, atol=1e-5)  # nothing is dropped
    assert (capacity == LENGTH) == np.allclose(expected[0], whole[0])


def test_gradients_equal_those_of_the_loops():
    """Compares slopes in random directions with finite differences of the loops in f64."""
    config, model, params = make(4, 2, 0.5)
    x_BSD, weights = inputs(), np.random.default_rng(2).normal(size=(ROWS, LENGTH, WIDTH))

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(params, x_BSD):
        y_BSD, penalty_B = train(model, params, x_BSD, REAL)
        return jnp.sum(y_BSD * weights) + jnp.sum(penalty_B)

    def value(params, x_BSD):
        y_BSD, penalty_B = reference(config, params, x_BSD, REAL, 2)
        return np.sum(y_BSD * weights) + np.sum(penalty_B)

    param_grads, x_grads = gradients(params, x_BSD)
    grads, point = {**param_grads, "x": x_grads}, jax.tree.map(np.float64, {**params, "x": x_BSD})
    rng = np.random.default_rng(3)
    for name in grads:
        direction, values = rng.normal(size=point[name].shape), []
        for step in (1e-6, -1e-6):
            moved = {**point, name: point[name] + step * direction}
            values.append(value(moved, moved["x"]))
        slope = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(np.sum(grads[name] * direction), slope, rtol=1e-3, err_msg=name)


def test_slots_go_to_the_first_tokens_and_not_to_padding():
    """Every token prefers expert 0, then 1; each expert takes 2 of the 4 tokens of the row."""
    config, model, params = make(2, 1, 1.0)
    router = np.zeros((WIDTH, 2), np.float32)
    router[0, 0] = 5.0
    params = params | {"router_kernel": router}
    x_BSD = np.abs(inputs()[:1, :4])
    whole = np.asarray(infer(model, params, x_BSD))[0]
    for real, kept in [((1, 1, 1, 1), [0, 1]), ((0, 1, 1, 1), [1, 2]), ((1, 0, 1, 0), [0, 2])]:
        y_SD = np.asarray(train(model, params, x_BSD, np.array([real], bool))[0])[0]
        expected = np.zeros_like(whole)
        expected[kept] = whole[kept]
        np.testing.assert_allclose(y_SD, expected, rtol=1e-5, atol=1e-6)
        assert np.all(np.any(whole != 0, axis=1))


def test_outputs_do_not_depend_on_later_tokens_or_other_rows():
    _, model, params = make(4, 2, 0.5)
    x_BSD, other = inputs(), inputs(seed=5)
    y_BSD, penalty_B = train(model, params, x_BSD, REAL)
    for stop in (2, 5):
        changed = np.where(np.arange(LENGTH)[:, None] >= stop, other, x_BSD)
        y = train(model, params, changed, REAL)[0]
        np.testing.assert_allclose(y[:, :stop], y_BSD[:, :stop], rtol=1e-5, atol=1e-6)
    neighbours = np.concatenate([x_BSD[:1], other[1:]])
    y, penalty = train(model, params, neighbours, np.ones_like(REAL))
    np.testing.assert_allclose(y[0], y_BSD[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(penalty[0], penalty_B[0], rtol=1e-6)
    assert np.any(y[1] != y_BSD[1]) and penalty[1] != penalty_B[1]


def test_balance_is_1_for_an_even_load_and_e_if_one_expert_gets_all():
    chosen_BSE = np.stack([np.eye(4, dtype=bool)[[0, 1, 2, 3, 0]], np.eye(4, dtype=bool)[[2, 2, 2, 2, 0]]])
    probs_BSE = np.stack([np.full((5, 4), 0.25), np.tile([0.0, 0, 1, 0], (5, 1))])
    real_BS = np.tile(np.arange(5) < 4, (2, 1))
    per_token_B = balance(probs_BSE, chosen_BSE & real_BS[..., None], real_BS) / 4
    np.testing.assert_allclose(per_token_B, [1, 4], rtol=1e-6)


@pytest.mark.parametrize("is_gated", [False, True])
def test_single_expert_equals_the_plain_feed_forward(is_gated):
    _, model, params = make(1, 1, 1.0, is_gated)
    kernel, bias = params["up_kernel"][0], params["up_bias"][0]
    down = {"kernel": params["down_kernel"][0], "bias": params["down_bias"][0]}
    if is_gated:
        plain = define(lambda rngs: SwiGLU(WIDTH, FF_WIDTH, rngs=rngs))
        up = {"gate_up": {"kernel": kernel.reshape(WIDTH, 2, FF_WIDTH), "bias": bias.reshape(2, FF_WIDTH)}}
    else:
        plain = define(lambda rngs: FeedForward(WIDTH, FF_WIDTH, "silu", rngs=rngs))
        up = {"up": {"kernel": kernel, "bias": bias}}
    x_BSD = inputs()
    expected = infer(plain, up | {"down": down}, x_BSD)
    np.testing.assert_allclose(infer(model, params, x_BSD), expected, rtol=1e-5, atol=1e-5)
    y_BSD = train(model, params, x_BSD, np.ones_like(REAL))[0]
    np.testing.assert_allclose(y_BSD, expected, rtol=1e-5, atol=1e-5)


def test_bf16_stays_bf16_and_balance_is_f32():
    _, model, params = make()
    x, params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (jnp.asarray(inputs()), params))
    y_BSD, penalty_B = jax.eval_shape(partial(train, model), params, x, REAL)
    assert y_BSD.dtype == jnp.bfloat16 == jax.eval_shape(partial(infer, model), params, x).dtype
    assert penalty_B.dtype == jnp.float32


def test_experts_are_initialised_like_a_plain_feed_forward():
    config = SASRecConfig(width=64, ff_width=96, num_experts=3)
    shape = config.block_shape(is_causal=True)
    experts = jax.jit(lambda: nnx.to_pure_dict(nnx.state(shape.make_experts(nnx.Rngs(0)))))()
    limit = (6 / (64 + 96)) ** 0.5  # the bound of Glorot's uniform for one kernel
    for name in ("up_kernel", "down_kernel"):
        np.testing.assert_allclose(np.abs(experts[name]).max(axis=(1, 2)), limit, rtol=0.01)
    assert not np.any(experts["up_bias"]) and 0 < np.std(experts["router_kernel"]) < 0.03


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_experts": 2, "experts_per_token": 3}, "experts_per_token=3 must be from 1 to num_experts=2"),
        ({"num_experts": -1}, "num_experts=-1 must be at least 0"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
        ({"balance_weight": -0.1}, "balance_weight=-0.1 must not be negative"),
    ],
)
def test_invalid_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SASRecConfig(**fields)
