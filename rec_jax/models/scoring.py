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

# Packed rows encoded at once, over all devices: what stays in the caches of a few cores.
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
    """The k best next items of each history: (scores f32[B, k], ids int32[B, k]), best first.

    batch: one history a row, with padding after it; at least one token of it for a model that is not causal.
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
    """Ranks by a sequence model: encodes each history, then asks the catalogue.

    Histories are cut to their last `max_len` events and packed into rows like those of training, split over
    the mesh axis "data". tables: those that are not parameters like any other; row-sharded ones stay where
    they are, and so do their scores. dims: score by so many first dims; 0 = by all.
    schema: the features that the model reads; where the queries lack one, it is missing at all events, and
    all count as at the same time.
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
        columns = {"item": queries.columns["item"]}
        for feature in self._schema:
            missing = np.nan if feature.kind == "number" else 0
            absent = np.broadcast_to(missing, len(columns["item"]))
            columns[feature.name] = queries.columns.get(feature.name, absent)
        return columns

    def _places(self, batch: Batch) -> dict:
        """The rows of ids in row-sharded tables."""
        if not self._placements:
            return {}
        ids = self._model.bind(self._model.abstract_params).table_ids(batch, {})
        return {
            name: {use: np.asarray(placement.to_physical(x)) for use, x in ids[name].items()}
            for name, placement in self._placements.items()
        }

    def _encode(self, queries: Queries) -> np.ndarray:
        """[B, D]: the output after the last event of each history, in blocks of packed rows of one shape."""
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
            # The last token of a segment is where the next position does not continue the count.
            following = np.pad(batch.positions[:, 1:], ((0, 0), (0, 1)))
            is_last = (batch.segments > 0) & (following == 0)
            # Nothing is known of the event to predict, whatever the log has after the history.
            batch = batch.replace(next=_without(is_last, batch.next))
            if extra:
                batch = batch.replace(events=_without(is_last, batch.events), is_query=is_last)
            row_Q, column_Q = np.nonzero(is_last)
            users_Q = slot_users[plan.row_starts[rows[0]] : plan.row_starts[rows[-1] + 1]]
            size = 1 << int(len(row_Q) - 1).bit_length()  # few shapes to compile
            pad = (0, size - len(row_Q))
            batch = batch.replace(local_ids=self._places(batch))
            placed = place_whole_batch(batch, self._mesh)
            query_positions = np.pad(row_Q, pad), np.pad(column_Q, pad)
            x_QD = _encode(self._model, self._params, placed, self._whole, self._dims, *query_positions)
            x_BD[users_Q] = np.asarray(x_QD)[: len(row_Q)]
        return x_BD


def _without(tokens_BS, columns: dict) -> dict:
    """The columns, missing at some tokens."""
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
    """The ranker by a model of any kind.

    schema: the features of the log. tables, dims: as of `SequenceRanker`. num_beams: of a search for semantic
    ids; 0 = as the model's config says.

    Raises ValueError for more dims than there are.
    """
    config = model.config
    if model.is_generative:
        if dims:
            raise ValueError(f"dims={dims}: model.type={config.type!r} scores no vectors")
        return BeamRanker(model, params, num_items, max_len, mesh, num_beams or config.num_beams)
    if dims > config.table_dim:
        raise ValueError(f"dims={dims}: the vectors have {config.table_dim} ({type(config).__name__})")
    schema = tuple(feature for feature in schema if feature.name in model.columns)
    return SequenceRanker(model, params, max_len, mesh, tables, dims, schema)
