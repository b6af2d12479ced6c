"""A straightforward JAX port of SASRec: the reference of the training benchmark.

A batch holds users padded to one length; attention computes all L x L weights and masks half of them;
dropout draws Threefry bits; the loss is computed at every position and masked. It is one jitted function on
one device, and XLA distributes its work over the cores. Parameters, hyper-parameters and maths are those of
`rec_jax.models.sasrec` with norm="original" (the published order of layers), so without dropout the losses
differ only by rounding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class PaddedBatch(NamedTuple):
    """int32[users, length]: each history starts at column 0 and is padded with zeros."""

    items: jax.Array
    targets: jax.Array


def pad_batch(histories, split, users: np.ndarray, length: int) -> PaddedBatch:
    batch = PaddedBatch(*np.zeros((2, len(users), length), np.int32))
    for row, user in enumerate(users):
        end = split.train_end[user]
        events = histories.items[max(histories.offsets[user], end - length - 1) : end]
        batch.items[row, : len(events) - 1] = events[:-1]
        batch.targets[row, : len(events) - 1] = events[1:]
    return batch


def encode(params, items_BS, num_layers: int, num_heads: int, drop):
    """Returns x_BSD for padded histories. `drop(x, site)` applies dropout."""
    table_VD = params["items"]["embedding"]
    batch, length = items_BS.shape
    width = table_VD.shape[1]
    causal_SS = jnp.tril(jnp.ones((length, length), bool))
    x = table_VD[items_BS] * width**0.5 + params["positions"]["embedding"][jnp.arange(length)]
    x = drop(x, 0)
    for i in range(num_layers):
        block = params["blocks"][i]
        q = _layer_norm(block["attention_norm"], x)
        x = q + drop(_attention(block["attention"], q, x, causal_SS, num_heads), 2 * i + 1)
        x = _layer_norm(block["ff_norm"], x)
        hidden = jax.nn.relu(_dense(block["ff"]["up"], x))
        x = x + drop(_dense(block["ff"]["down"], hidden), 2 * i + 2)
    return _layer_norm(params["final_norm"], x)


def bce_loss(params, batch, negatives_BS, num_layers: int, num_heads: int, drop):
    """Returns (sum, number) over real positions: binary cross-entropy with one negative per position."""
    x = encode(params, batch.items, num_layers, num_heads, drop)
    table_VD = params["items"]["embedding"]
    pos = jnp.sum(x * table_VD[batch.targets], axis=-1)
    neg = jnp.sum(x * table_VD[negatives_BS], axis=-1)
    loss = jax.nn.softplus(-pos) + jnp.where(negatives_BS == batch.targets, 0, jax.nn.softplus(neg))
    real = batch.targets > 0
    return jnp.sum(loss * real), jnp.sum(real)


def make_naive_step(num_items: int, num_layers: int, num_heads: int, rate: float, optimizer):
    """Returns jitted `step((params, opt_state, key), batch) -> (params, opt_state, key), loss`.

    The step donates its state.
    """

    def step(state, batch):
        params, opt_state, key = state
        key, negative_key, dropout_key = jax.random.split(key, 3)
        negatives = jax.random.randint(negative_key, batch.targets.shape, 1, num_items + 1)

        def drop(x, site):
            keep = jax.random.bernoulli(jax.random.fold_in(dropout_key, site), 1 - rate, x.shape)
            return jnp.where(keep, x / (1 - rate), 0)

        def mean_loss(params):
            total, count = bce_loss(params, batch, negatives, num_layers, num_heads, drop)
            return total / count

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), loss

    return jax.jit(step, donate_argnums=0)


def _dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def _layer_norm(layer, x):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.var(x, axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-6) * layer["scale"] + layer["bias"]


def _attention(layer, q_in, memory, causal_SS, num_heads):
    batch, length, width = q_in.shape
    q = _dense(layer["query"], q_in).reshape(batch, length, num_heads, -1)
    kernel, bias = layer["key_value"]["kernel"], layer["key_value"]["bias"]  # [D, 2, D], [2, D]
    kv = memory @ kernel.reshape(len(kernel), -1) + bias.reshape(-1)
    kv = kv.reshape(batch, length, 2, num_heads, -1)
    k, v = kv[:, :, 0], kv[:, :, 1]
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k) / (width // num_heads) ** 0.5
    weights = jax.nn.softmax(jnp.where(causal_SS, logits, -jnp.inf), axis=-1)
    out = jnp.einsum("bnqk,bknh->bqnh", weights, v)
    return _dense(layer["out"], out.reshape(batch, length, width))
