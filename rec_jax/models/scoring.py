"""Scores of a trained sequence model for any history: what evaluation and recommendation read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.data.packing import fill_rows, plan_packing
from rec_jax.data.schema import TIME
from rec_jax.mesh import place_whole_batch, replicate
from rec_jax.models.base import Model, get_table, with_table, without_table
from rec_jax.nn.quantized import score_items
from rec_jax.nn.sharded import AXES, SpreadScores

# Packed rows encoded at once, over all devices: what stays in the caches of a few cores.
_ENCODE_TOKENS = 3_200


@partial(jax.jit, static_argnums=(0, 3, 4))
def _encode(model: Model, params, batch, whole, dims, row_Q, column_Q):
    module = model.bind(params)
    x_QD = module(batch, at=(row_Q, column_Q))
    x_QD = module.cut_queries(x_QD, dims) if dims else x_QD
    return jax.lax.with_sharding_constraint(x_QD, whole)


@partial(jax.jit, static_argnums=(0, 2))
def _item_vectors(model: Model, params, dims):
    module = model.bind(params)
    table_VD = module.item_vectors()
    if not dims:
        return table_VD
    table_VD = table_VD.dequantize() if hasattr(table_VD, "dequantize") else table_VD
    return module.cut_items(table_VD, dims)


@jax.jit
def _scores(table_VD, x_BD):
    return score_items(x_BD, table_VD).at[:, 0].set(-jnp.inf)


@partial(jax.jit, static_argnums=(0, 3))
def top_items(model: Model, params, batch, k: int):
    """The k best next items of each history: (scores f32[B, k], ids int32[B, k]), best first.

    batch: one history a row, with padding after it.
    """
    last_B = jnp.sum(batch.segments > 0, axis=1) - 1
    module = model.bind(params)
    x_BD = module(batch, at=(jnp.arange(len(last_B)), last_B))
    return jax.lax.top_k(_scores(module.item_vectors(), x_BD), k)


@partial(jax.jit, static_argnums=2)
def _spread_scores(table_VD, x_BD, sharding):
    scores_BV = jnp.matmul(x_BD, table_VD.T, preferred_element_type=jnp.float32)
    return jax.lax.with_sharding_constraint(scores_BV, sharding)


class SequenceScorer:
    """`score_fn(users, ends)` over the histories of a data set, or over one given history.

    Histories are packed into rows like those of training, split over the mesh axis "data". layout: of the
    table of items, if it is not a parameter like any other. Spread rows stay where they are, and so do their
    scores. Several processes must all ask for the same. dims: score by so many first dims; 0 = by all.
    """

    def __init__(self, model: Model, params, histories, max_len: int, mesh: Mesh, layout=None, dims: int = 0):
        self._histories, self._max_len, self._mesh = histories, max_len, mesh
        self._placement = getattr(layout, "placement", None)
        num_devices = mesh.shape["data"]
        self._rows = -(-max(1, _ENCODE_TOKENS // max_len) // num_devices) * num_devices

        self._model, self._whole, self._dims = model, NamedSharding(mesh, P()), dims
        if self._placement is None:
            self._params = replicate(params, mesh)
            table_VD = _item_vectors(model, self._params, dims)  # an array, or a quantized table
            self._table_VD = jax.tree.map(lambda x: x.addressable_data(0), table_VD)
        else:
            self._params = with_table(replicate(without_table(params), mesh), get_table(params))
            self._table_VD = _item_vectors(model, self._params, dims)

    def __call__(self, users: np.ndarray, ends: np.ndarray) -> jax.Array:
        """Scores of the whole catalogue for the event after each history.

        users: int[B]. ends: int[B]; history b is items[offsets[users[b]]:ends[b]], at least one event.
        Returns f32[B, V + 1] on one device, column 0 (padding) -inf; or SpreadScores of a spread table.
        """
        starts = self._histories.offsets[users]
        times = self._histories.times if self._model.columns else None
        return self._score(self._histories.items, np.asarray(ends), ends - starts, times)

    def score_history(self, items: np.ndarray, times: np.ndarray | None = None) -> jax.Array:
        """f32[V + 1]: scores of the event after the given item ids, oldest first. times: int64 seconds of
        these events, for a model that reads them; without, all count as at the same time."""
        items = np.asarray(items, np.int32)
        if items.size == 0:
            raise ValueError("the history is empty: a sequence model needs at least one item")
        if not self._model.columns:
            times = None
        elif times is None:
            times = np.zeros(items.size, np.int64)
        scores = self._score(items, np.array([items.size]), np.array([items.size]), times)
        if isinstance(scores, SpreadScores):
            scores = jax.jit(SpreadScores.in_order, out_shardings=self._whole)(scores)
        return scores[0]

    def _score(self, items, ends, lengths, times=None):
        """Encodes packed rows in blocks of one fixed shape, then scores the last token of each history."""
        if np.any(lengths < 1):
            raise ValueError(f"history {int(np.argmin(lengths))} of the batch is empty: nothing to encode")
        behind = 0 if self._model.is_causal else 1  # a token to ask for, after the last event
        plan = plan_packing(lengths + behind, self._max_len)
        slot_users = np.empty_like(plan.users_by_len)
        slot_users[plan.slots_by_len] = plan.users_by_len
        x_BD = np.empty((len(ends), self._table_VD.shape[1]), getattr(self._table_VD, "dtype", np.float32))
        for first in range(0, plan.num_rows, self._rows):
            rows = np.arange(first, min(first + self._rows, plan.num_rows))
            columns = {"item": items} | ({} if times is None else {"time": times})
            schema = () if times is None else (TIME,)
            batch = fill_rows(columns, plan, rows, slot_users, ends + behind, self._rows, schema)
            # The last token of a segment is where the next position does not go on counting.
            following = np.pad(batch.positions[:, 1:], ((0, 0), (0, 1)))
            is_last = (batch.segments > 0) & (following == 0)
            if behind:  # before anything reads what stands there: it is the event to predict
                batch = jax.tree.map(np.asarray, batch.hide(is_last)).replace(is_query=is_last)
            row_Q, column_Q = np.nonzero(is_last)
            users_Q = slot_users[plan.row_starts[rows[0]] : plan.row_starts[rows[-1] + 1]]
            size = 1 << int(len(row_Q) - 1).bit_length()  # few shapes to compile
            pad = (0, size - len(row_Q))
            if self._placement is not None:
                physical = np.asarray(self._placement.to_physical(batch.items))
                batch = batch.replace(places={"items": {"events": physical}})
            placed = place_whole_batch(batch, self._mesh)
            at = np.pad(row_Q, pad), np.pad(column_Q, pad)
            x_QD = _encode(self._model, self._params, placed, self._whole, self._dims, *at)
            x_BD[users_Q] = np.asarray(x_QD)[: len(row_Q)]
        if self._placement is None:
            return _scores(self._table_VD, x_BD)
        scores_BV = _spread_scores(self._table_VD, x_BD, NamedSharding(self._mesh, P(None, AXES)))
        return SpreadScores(scores_BV, self._placement, self._mesh)
