"""Trains a few arrays with pruning masks, for the tests of pruning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rec_jax.compress.prune import PruneConfig, prune

KERNELS = ".*kernel"
ONCE = PruneConfig(names=KERNELS, share=0.5, schedule="one_shot", end=0.0)  # prunes in the first step


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "up": {"kernel": (32, 8), "bias": (8,)},
        "down": {"kernel": (16, 32)},
        "items": {"table": (64, 8)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )


def make_grads(params, index):
    """Gradients that differ in each step and rank differently from the weights."""
    return jax.tree.map(lambda p: jnp.sin(7 * p + index) + 0.1 * p, params)


@functools.cache
def make_step(update):
    @jax.jit
    def step(params, state, grads):
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(optimizer, params, steps, grads_of=make_grads, each=lambda params, state: None):
    """Returns (params, state) after some steps. each: called after every step."""
    step, state = make_step(optimizer.update), optimizer.init(params)
    for index in range(steps):
        params, state = step(params, state, grads_of(params, index))
        each(params, state)
    return params, state


def one_step(config, params, grads=None, inner=None):
    inner = optax.sgd(0.0) if inner is None else inner
    grads = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
    return train(prune(inner, config, params, 10), params, 1, lambda *_: grads)


def with_kernel(values):
    return {"kernel": jnp.asarray(values, jnp.float32)}
