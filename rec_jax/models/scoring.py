"""A trained sequence model as a ranker."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.data.batch import Batch
from rec_jax.data.packing import fill_rows, plan_packing
from rec_jax.data.queries import Queries
from rec_jax.data.schema import TIME, Schema
from rec_jax.mesh import place_whole_batch, replicate
from rec_jax.models.base import Model
from rec_jax.models.beam import BeamRanker
from rec_jax.models.ranker import ScoreRanker
from rec_jax.objectives.catalogue import Catalogue, Scores
from rec_jax.tables.tables import Tables

# Tokens encoded at once, over all devices: few enough for the caches of a few CPU cores.
_ENCODE_TOKENS = 3_200


@partial(jax.jit, static_argnums=(0, 3, 4))
def _encode(model: Model, params, batch, whole, dims, row_Q, column_Q):
    module = model.bind(params)
    x_QD = module(batch, query_positions=(row_Q, column_Q))
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


@partial(jax.jit, static_argnums=(0, 3))
def top_items(model: Model, params, batch, k: int):
    """Returns (scores f32[B, k], ids int32[B, k]): the k best next items of each history, best first.

    batch: one history per row, then padding; a model that is not causal needs at least one token of padding.
    """
    last_B = jnp.sum(batch.segments > 0, axis=1) - 1
    if not model.is_causal:  # the event to predict is a query token after the last one
        last_B += 1
        is_query_BS = jnp.arange(batch.segments.shape[1]) == last_B[:, None]
        segments_BS = jnp.where(is_query_BS, 1, batch.segments)
        positions_BS = jnp.where(is_query_BS, last_B[:, None], batch.positions)
        batch = batch.replace(segments=segments_BS, positions=positions_BS, is_query=is_query_BS)
    module = model.bind(params)
    x_BD = module(batch, query_positions=(jnp.arange(len(last_B)), last_B))
    return Catalogue(module.item_vectors()).scores(x_BD).top_k(k)


class SequenceRanker(ScoreRanker):
    """Ranks with a sequence model: encodes each history, then scores the catalogue.

    Histories are cut to their last `max_len` events and packed into rows as in training. Rows are sharded
    over the mesh axis "data".

    tables: the embedding tables that are not plain parameters. Row-sharded tables stay sharded, and so do the
    scores of their items. dims: score by this number of first dims (a Matryoshka prefix); 0 = all.
    schema: the features that the model reads. One that the queries lack counts as missing at all events;
    without times, all events count as simultaneous.
    """

    def __init__(
        self,
        model: Model,
        params,
        max_len: int,
        mesh: Mesh,
        tables: Tables | None = None,
        dims: int = 0,
        schema: Schema | None = None,
    ):
        self._schema = ((TIME,) if model.columns else ()) if schema is None else schema
        self._model, self._max_len, self._mesh, self._dims = model, max_len, mesh, dims
        self._whole = NamedSharding(mesh, P())
        num_devices = mesh.shape["data"]
        self._rows = -(-max(1, _ENCODE_TOKENS // max_len) // num_devices) * num_devices
        sharded = Tables({name: x for name, x in (tables or Tables({})).tables.items() if x.placement})
        self._placements = {name: table.placement for name, table in sharded.tables.items()}
        dense, arrays = sharded.split(params)
        self._params = sharded.join(replicate(dense, mesh), arrays)
        vectors = _item_vectors(model, self._params, dims)  # an array, or a quantized table
        if placement := self._placements.get("items"):
            self._catalogue = Catalogue(vectors, placement, mesh)
        else:
            self._catalogue = Catalogue(jax.tree.map(lambda x: x.addressable_data(0), vectors))

    def scores(self, queries: Queries) -> Scores:
        return self._catalogue.scores(self._encode(queries))

    def _columns(self, queries: Queries) -> dict[str, np.ndarray]:
        """Returns the columns that the model reads, filled with missing values if the queries lack one."""
        columns = {"item": queries.columns["item"]}
        for feature in self._schema:
            missing = np.nan if feature.kind == "number" else 0
            all_missing = np.broadcast_to(missing, len(columns["item"]))
            columns[feature.name] = queries.columns.get(feature.name, all_missing)
        return columns

    def _local_ids(self, batch: Batch) -> dict:
        """Returns where the ids of a batch are in the row-sharded tables, as for `Batch.local_ids`."""
        if not self._placements:
            return {}
        ids = self._model.bind(self._model.abstract_params).table_ids(batch, {})
        return {
            name: {use: np.asarray(placement.to_physical(x)) for use, x in ids[name].items()}
            for name, placement in self._placements.items()
        }

    def _encode(self, queries: Queries) -> np.ndarray:
        """Returns the query vector after each history, [B, D]. Encodes packed rows in blocks of one shape."""
        extra = 0 if self._model.is_causal else 1  # a query token after the last event
        plan = plan_packing(queries.lengths + extra, self._max_len)
        slot_users = np.empty_like(plan.users_by_len)
        slot_users[plan.slots_by_len] = plan.users_by_len
        columns = self._columns(queries)
        vectors = self._catalogue.vectors
        x_BD = np.empty((len(queries), vectors.shape[1]), getattr(vectors, "dtype", np.float32))
        for first in range(0, plan.num_rows, self._rows):
            rows = np.arange(first, min(first + self._rows, plan.num_rows))
            batch = fill_rows(columns, plan, rows, slot_users, queries.ends + extra, self._rows, self._schema)
            # At the last token of a segment, the position that follows is 0.
            following = np.pad(batch.positions[:, 1:], ((0, 0), (0, 1)))
            is_last = (batch.segments > 0) & (following == 0)
            # The log may contain the event to predict: hide it.
            batch = batch.replace(next=_without(is_last, batch.next))
            if extra:
                batch = batch.replace(events=_without(is_last, batch.events), is_query=is_last)
            row_Q, column_Q = np.nonzero(is_last)
            users_Q = slot_users[plan.row_starts[rows[0]] : plan.row_starts[rows[-1] + 1]]
            size = 1 << int(len(row_Q) - 1).bit_length()  # few shapes to compile
            pad = (0, size - len(row_Q))
            batch = batch.replace(local_ids=self._local_ids(batch))
            placed = place_whole_batch(batch, self._mesh)
            query_positions = np.pad(row_Q, pad), np.pad(column_Q, pad)
            x_QD = _encode(self._model, self._params, placed, self._whole, self._dims, *query_positions)
            x_BD[users_Q] = np.asarray(x_QD)[: len(row_Q)]
        return x_BD


def _without(tokens_BS, columns: dict) -> dict:
    """Returns the columns with zeros, which mean missing, at these tokens."""
    return {name: np.where(tokens_BS, np.zeros((), x.dtype), x) for name, x in columns.items()}


def make_ranker(
    model: Model,
    params,
    num_items: int,
    max_len: int,
    mesh: Mesh,
    *,
    schema=(),
    tables=None,
    dims=0,
    num_beams=0,
) -> ScoreRanker:
    """Returns the ranker of a model of any type.

    schema: the features of the log. tables, dims: see `SequenceRanker`. num_beams: beams of a generative
    retrieval model; 0 = as in its config.

    Raises ValueError if dims is set for a generative retrieval model, or is larger than the item vectors.
    """
    config = model.config
    if model.is_generative:
        if dims:
            raise ValueError(
                f"dims={dims} is not supported with model.type={config.type!r}, which has no item vectors: "
                "set dims=0"
            )
        return BeamRanker(model, params, num_items, max_len, mesh, num_beams or config.num_beams)
    if dims > config.table_dim:
        raise ValueError(
            f"dims={dims} must be at most {config.table_dim}, the dims of the item vectors "
            f"({type(config).__name__})"
        )
    schema = tuple(feature for feature in schema if feature.name in model.columns)
    return SequenceRanker(model, params, max_len, mesh, tables, dims, schema)
