"""Exact cross-entropy over the whole catalogue without holding all logits in memory.

The same sum is computed by one of two schedules, chosen by catalogue size. The tests compare both with the
naive formula.

* Small catalogue: tiles of tokens x all items. The loss is linear in its per-token terms, so the gradients
  are computed in the forward pass, while a tile of probabilities is in cache, and the backward pass only
  scales them: 6*N*V*D multiply-adds and one exponential per logit, as in the naive formula. Tiles in which
  all tokens have weight 0 are skipped: most tiles, if a model predicts few masked tokens.
* Large catalogue: all tokens x tiles of items with a running maximum and sum; the backward pass recomputes
  the logits: 8*N*V*D multiply-adds, two exponentials per logit, and temporary memory that does not grow
  with V. Row-sharded tables use this schedule as well.
"""

import jax
import jax.numpy as jnp

from rec_jax.tables.exchange import AXES, shard_index

# Elements of a tile of logits: 8 MiB of f32, which fits into the shared cache of current CPUs.
TILE_ELEMENTS = 2**21
# Number of items from which the gradient of the whole table in each tile costs more than recomputing logits.
STREAM_ITEMS = 32_768
_MASKED = -1e30


def softmax_cross_entropy(h_TD, table_VD, targets_T, weights_T) -> jax.Array:
    """Sum over tokens of weight * (logsumexp_v <h, table_v> - <h, table_target>), an f32 scalar.

    Entry 0 of the table is padding and left out. Tokens of weight 0 add nothing to the loss or its gradients.
    Gradients flow to `h_TD` and `table_VD`.
    """
    schedule = _token_tiles if table_VD.shape[0] < STREAM_ITEMS else _item_tiles
    return schedule(h_TD, table_VD, targets_T, weights_T.astype(jnp.float32))


def naive_softmax_cross_entropy(h_TD, table_VD, targets_T, weights_T) -> jax.Array:
    """The formula with all logits in one array: the reference in tests, and the baseline of the benchmark."""
    logits_TV = dot_f32(h_TD, table_VD).at[:, 0].set(_MASKED)
    target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
    return jnp.sum(weights_T * (jax.nn.logsumexp(logits_TV, axis=-1) - target_T))


def dot_f32(a_XD, b_YD):
    """a @ b.T accumulated in f32."""
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a_XD, b_YD, dims, preferred_element_type=jnp.float32)


def dot_t_f32(a_XY, b_XD):
    """a.T @ b accumulated in f32."""
    dims = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(a_XY, b_XD, dims, preferred_element_type=jnp.float32)


def tiled(x, num_tiles, size):
    """Pads the first dim with zeros and splits it: [num_tiles, size, ...]."""
    pad = [(0, num_tiles * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad).reshape(num_tiles, size, *x.shape[1:])


@jax.custom_vjp
def _token_tiles(h_TD, table_VD, targets_T, weights_T):
    return _token_tiles_fwd(h_TD, table_VD, targets_T, weights_T)[0]


def _token_tiles_fwd(h_TD, table_VD, targets_T, weights_T):
    num_tokens, num_rows = h_TD.shape[0], table_VD.shape[0]
    num_tiles = -(-num_tokens * num_rows // TILE_ELEMENTS)
    size = -(-num_tokens // num_tiles)

    # Move tokens of weight 0 to the end, so that whole tiles of them can be skipped.
    order_T = jnp.argsort(weights_T == 0, stable=True)
    xs = h_TD[order_T], targets_T[order_T], weights_T[order_T]

    def tile(carry, xs):
        return jax.lax.cond(xs[2][0] != 0, add_tile, skip_tile, carry, xs)

    def skip_tile(carry, xs):
        return carry, jnp.zeros(xs[0].shape, jnp.float32)

    def add_tile(carry, xs):
        loss, dtable_VD = carry
        h_tD, targets_t, weights_t = xs
        logits_tV = dot_f32(h_tD, table_VD).at[:, 0].set(_MASKED)
        max_t = jnp.max(logits_tV, axis=-1)
        exp_tV = jnp.exp(logits_tV - max_t[:, None])
        sum_t = jnp.sum(exp_tV, axis=-1)
        target_t = jnp.sum((h_tD * table_VD[targets_t]).astype(jnp.float32), axis=-1)
        loss += jnp.sum(weights_t * (jnp.log(sum_t) + max_t - target_t))
        dlogits_tV = (exp_tV * (weights_t / sum_t)[:, None]).astype(h_tD.dtype)
        dh_tD = jnp.dot(dlogits_tV, table_VD, preferred_element_type=jnp.float32)
        return (loss, dtable_VD + dot_t_f32(dlogits_tV, h_tD)), dh_tD

    init = (jnp.zeros((), jnp.float32), jnp.zeros(table_VD.shape, jnp.float32))
    xs = tuple(tiled(x, num_tiles, size) for x in xs)
    if num_tiles == 1:
        (loss, dtable_VD), dh_TD = tile(init, tuple(x[0] for x in xs))
    else:
        (loss, dtable_VD), dh_TD = jax.lax.scan(tile, init, xs)
    dh_TD = dh_TD.reshape(-1, h_TD.shape[1])[jnp.argsort(order_T)]
    dh_TD -= weights_T[:, None] * table_VD[targets_T]
    dtable_VD = dtable_VD.at[targets_T].add(-weights_T[:, None] * h_TD)
    # Empty arrays carry the dtypes that the gradients are cast to.
    return loss, (dh_TD, dtable_VD, h_TD[:0], table_VD[:0])


def _token_tiles_bwd(residuals, grad):
    dh_TD, dtable_VD, h_like, table_like = residuals
    return (grad * dh_TD).astype(h_like.dtype), (grad * dtable_VD).astype(table_like.dtype), None, None


_token_tiles.defvjp(_token_tiles_fwd, _token_tiles_bwd)


@jax.custom_vjp
def _item_tiles(h_TD, table_VD, targets_T, weights_T):
    return _item_tiles_fwd(h_TD, table_VD, targets_T, weights_T)[0]


def _item_tiling(num_tokens, num_rows):
    size = min(num_rows, max(128, TILE_ELEMENTS // num_tokens))
    num_tiles = -(-num_rows // size)
    return num_tiles, size


def _item_slices(table_VD, real_V, num_tiles, size):
    """Returns a function: i -> (start, entries, is_real) of tile i. The last tile is moved back so that it
    ends with the table; entries that it shares with the tile before are not real."""
    num_rows = table_VD.shape[0]

    def tile_slice(i):
        start = jnp.minimum(i * size, num_rows - size)
        rows_vD = jax.lax.dynamic_slice_in_dim(table_VD, start, size)
        real_v = jax.lax.dynamic_slice_in_dim(real_V, start, size)
        return start, rows_vD, (start + jnp.arange(size) >= i * size) & real_v

    return tile_slice


def _sum_tiles(h_TD, table_VD, real_V):
    """Returns (maximum, sum of exp(logit - maximum)) over the real entries, each f32[T]."""
    num_tiles, size = _item_tiling(h_TD.shape[0], table_VD.shape[0])
    tile_slice = _item_slices(table_VD, real_V, num_tiles, size)

    def tile(carry, i):
        max_T, sum_T = carry
        _, rows_vD, real_v = tile_slice(i)
        logits_Tv = jnp.where(real_v, dot_f32(h_TD, rows_vD), _MASKED)
        new_T = jnp.maximum(max_T, jnp.max(logits_Tv, axis=-1))
        exp_T = jnp.sum(jnp.exp(logits_Tv - new_T[:, None]), axis=-1)
        return (new_T, sum_T * jnp.exp(max_T - new_T) + exp_T), None

    zeros_T = jnp.zeros(h_TD.shape[0], jnp.float32)
    return jax.lax.scan(tile, (zeros_T + _MASKED, zeros_T), jnp.arange(num_tiles))[0]


def _grad_tiles(h_TD, table_VD, real_V, weights_T, lse_T, dh_TD, dtable_VD):
    """Adds the gradients of sum(weights_T * lse_T) to dh_TD and dtable_VD."""
    num_tiles, size = _item_tiling(h_TD.shape[0], table_VD.shape[0])
    tile_slice = _item_slices(table_VD, real_V, num_tiles, size)

    def tile(carry, i):
        dh_TD, dtable_VD = carry
        start, rows_vD, real_v = tile_slice(i)
        logits_Tv = jnp.where(real_v, dot_f32(h_TD, rows_vD), _MASKED)
        dlogits_Tv = (jnp.exp(logits_Tv - lse_T[:, None]) * weights_T[:, None]).astype(h_TD.dtype)
        dh_TD += jnp.dot(dlogits_Tv, rows_vD, preferred_element_type=jnp.float32)
        old_vD = jax.lax.dynamic_slice_in_dim(dtable_VD, start, size)
        new_vD = old_vD + dot_t_f32(dlogits_Tv, h_TD)
        return (dh_TD, jax.lax.dynamic_update_slice_in_dim(dtable_VD, new_vD, start, 0)), None

    return jax.lax.scan(tile, (dh_TD, dtable_VD), jnp.arange(num_tiles))[0]


def _item_tiles_fwd(h_TD, table_VD, targets_T, weights_T):
    max_T, sum_T = _sum_tiles(h_TD, table_VD, jnp.arange(len(table_VD)) > 0)
    lse_T = max_T + jnp.log(sum_T)
    target_T = jnp.sum((h_TD * table_VD[targets_T]).astype(jnp.float32), axis=-1)
    loss = jnp.sum(weights_T * (lse_T - target_T))
    return loss, (h_TD, table_VD, targets_T, weights_T, lse_T)


def _item_tiles_bwd(residuals, grad):
    h_TD, table_VD, targets_T, weights_T, lse_T = residuals
    weights_T = weights_T * grad
    dh_TD = -weights_T[:, None] * table_VD[targets_T].astype(jnp.float32)
    dtable_VD = jnp.zeros(table_VD.shape, jnp.float32).at[targets_T].add(-weights_T[:, None] * h_TD)
    real_V = jnp.arange(len(table_VD)) > 0
    dh_TD, dtable_VD = _grad_tiles(h_TD, table_VD, real_V, weights_T, lse_T, dh_TD, dtable_VD)
    return dh_TD.astype(h_TD.dtype), dtable_VD.astype(table_VD.dtype), None, None


_item_tiles.defvjp(_item_tiles_fwd, _item_tiles_bwd)


@jax.custom_vjp
def sharded_softmax_cross_entropy(h_TD, table_vD, real_v, targets_T, weights_T) -> jax.Array:
    """`softmax_cross_entropy` of the tokens of one device, with a table that is row-sharded over a mesh.

    Runs inside a shard_map over "data" and "model"; tokens are split over "data" only. Each device scores the
    tokens of all devices against its own entries. Devices exchange tokens and three numbers per token, never
    table entries. The gradient of table_vD is complete: it covers the tokens of all devices, and must not be
    summed again.

    table_vD: the entries of this device; real_v: bool[v], whether each is an item. targets_T: row indices in
    the whole array.

    Source: the vocabulary-parallel cross-entropy of Megatron-LM (arXiv 1909.08053, section 3).
    """
    return _sharded_fwd(h_TD, table_vD, real_v, targets_T, weights_T)[0]


def _sharded_fwd(h_TD, table_vD, real_v, targets_T, weights_T):
    all_TD, all_targets_T = (jax.lax.all_gather(x, "data", tiled=True) for x in (h_TD, targets_T))
    max_T, sum_T = _sum_tiles(all_TD, table_vD, real_v)
    all_max_T = jax.lax.pmax(max_T, AXES)
    local_T = all_targets_T - shard_index() * len(table_vD)
    is_local_T = (local_T >= 0) & (local_T < len(table_vD))
    local_T = jnp.where(is_local_T, local_T, len(table_vD))
    rows_TD = table_vD.at[local_T].get(mode="fill", fill_value=0)
    target_T = jnp.sum((all_TD * rows_TD).astype(jnp.float32), axis=-1)
    sum_T, target_T = jax.lax.psum((sum_T * jnp.exp(max_T - all_max_T), target_T), AXES)
    lse_T = all_max_T + jnp.log(sum_T)
    start = jax.lax.axis_index("data") * len(h_TD)
    own_T = jax.lax.dynamic_slice_in_dim(lse_T - target_T, start, len(h_TD))
    loss = jnp.sum(weights_T * own_T)
    return loss, (all_TD, table_vD, real_v, local_T, rows_TD, weights_T, lse_T)


def _sharded_bwd(residuals, grad):
    all_TD, table_vD, real_v, local_T, rows_TD, weights_T, lse_T = residuals
    all_weights_T = jax.lax.all_gather(weights_T * grad, "data", tiled=True)
    dh_TD = -all_weights_T[:, None] * rows_TD.astype(jnp.float32)
    dtable_vD = jnp.zeros(table_vD.shape, jnp.float32)
    dtable_vD = dtable_vD.at[local_T].add(-all_weights_T[:, None] * all_TD, mode="drop")
    dh_TD, dtable_vD = _grad_tiles(all_TD, table_vD, real_v, all_weights_T, lse_T, dh_TD, dtable_vD)
    dh_TD = jax.lax.psum_scatter(jax.lax.psum(dh_TD, "model"), "data", scatter_dimension=0, tiled=True)
    return dh_TD.astype(all_TD.dtype), dtable_vD.astype(table_vD.dtype), None, None, None


sharded_softmax_cross_entropy.defvjp(_sharded_fwd, _sharded_bwd)
