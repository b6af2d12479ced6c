"""Scores of a trained sequence model for any history: what evaluation and recommendation read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.data.packing import fill_rows, plan_packing
from rec_jax.mesh import place_whole_batch, replicate
from rec_jax.models.base import Model, get_table, with_table, without_table
from rec_jax.nn.sharded import AXES, SpreadScores

# Packed rows encoded at once, over all devices: what stays in the caches of a few cores.
_ENCODE_TOKENS = 3_200


@partial(jax.jit, static_argnums=(0, 3))
def _encode(model: Model, params, batch, whole, row_Q, column_Q):
    return jax.lax.with_sharding_constraint(model.bind(params)(batch, at=(row_Q, column_Q)), whole)


@partial(jax.jit, static_argnums=0)
def _item_vectors(model: Model, params):
    return model.bind(params).item_vectors()


@jax.jit
def _scores(table_VD, x_BD):
    return jnp.matmul(x_BD, table_VD.T, preferred_element_type=jnp.float32).at[:, 0].set(-jnp.inf)


@partial(jax.jit, static_argnums=2)
def _spread_scores(table_VD, x_BD, sharding):
    scores_BV = jnp.matmul(x_BD, table_VD.T, preferred_element_type=jnp.float32)
    return jax.lax.with_sharding_constraint(scores_BV, sharding)


class SequenceScorer:
    """`score_fn(users, ends)` over the histories of a data set, or over one given history.

    Histories are packed into rows like those of training, split over the mesh axis "data". layout: of the
    table of items, if it is not a parameter like any other. Spread rows stay where they are, and so do their
    scores. Several processes must all ask for the same.
    """

    def __init__(self, model: Model, params, histories, max_len: int, mesh: Mesh, layout=None):
        self._histories, self._max_len, self._mesh = histories, max_len, mesh
        self._placement = getattr(layout, "placement", None)
        num_devices = mesh.shape["data"]
        self._rows = -(-max(1, _ENCODE_TOKENS // max_len) // num_devices) * num_devices

        self._model, self._whole = model, NamedSharding(mesh, P())
        if self._placement is None:
            self._params = replicate(params, mesh)
            self._table_VD = _item_vectors(model, self._params).addressable_data(0)
        else:
            array = jax.jit(layout.spread, out_shardings=NamedSharding(mesh, P(AXES)))(get_table(params))
            self._params = with_table(replicate(without_table(params), mesh), array)
            self._table_VD = _item_vectors(model, self._params)

    def __call__(self, users: np.ndarray, ends: np.ndarray) -> jax.Array:
        """Scores of the whole catalogue for the event after each history.

        users: int[B]. ends: int[B]; history b is items[offsets[users[b]]:ends[b]], at least one event.
        Returns f32[B, V + 1] on one device, column 0 (padding) -inf; or SpreadScores of a spread table.
        """
        starts = self._histories.offsets[users]
        return self._score(self._histories.items, np.asarray(ends), ends - starts)

    def score_history(self, items: np.ndarray) -> jax.Array:
        """f32[V + 1]: scores of the event after the given item ids, oldest first."""
        items = np.asarray(items, np.int32)
        if items.size == 0:
            raise ValueError("the history is empty: a sequence model needs at least one item")
        scores = self._score(items, np.array([items.size]), np.array([items.size]))
        if isinstance(scores, SpreadScores):
            scores = jax.jit(SpreadScores.in_order, out_shardings=self._whole)(scores)
        return scores[0]

    def _score(self, items, ends, lengths):
        """Encodes packed rows in blocks of one fixed shape, then scores the last token of each history."""
        if np.any(lengths < 1):
            raise ValueError(f"history {int(np.argmin(lengths))} of the batch is empty: nothing to encode")
        plan = plan_packing(lengths, self._max_len)
        slot_users = np.empty_like(plan.users_by_len)
        slot_users[plan.slots_by_len] = plan.users_by_len
        x_BD = np.empty((len(ends), self._table_VD.shape[1]), self._table_VD.dtype)
        for first in range(0, plan.num_rows, self._rows):
            rows = np.arange(first, min(first + self._rows, plan.num_rows))
            batch = fill_rows(items, plan, rows, slot_users, ends, self._rows)
            # The last token of a segment is where the next position does not go on counting.
            following = np.pad(batch["positions"][:, 1:], ((0, 0), (0, 1)))
            is_last = (batch["segments"] > 0) & (following == 0)
            row_Q, column_Q = np.nonzero(is_last)
            users_Q = slot_users[plan.row_starts[rows[0]] : plan.row_starts[rows[-1] + 1]]
            size = 1 << int(len(row_Q) - 1).bit_length()  # few shapes to compile
            pad = (0, size - len(row_Q))
            if self._placement is not None:
                batch["items"] = np.asarray(self._placement.to_physical(batch["items"]))
            placed = place_whole_batch(batch, self._mesh)
            at = np.pad(row_Q, pad), np.pad(column_Q, pad)
            x_QD = _encode(self._model, self._params, placed, self._whole, *at)
            x_BD[users_Q] = np.asarray(x_QD)[: len(row_Q)]
        if self._placement is None:
            return _scores(self._table_VD, x_BD)
        scores_BV = _spread_scores(self._table_VD, x_BD, NamedSharding(self._mesh, P(None, AXES)))
        return SpreadScores(scores_BV, self._placement, self._mesh)
