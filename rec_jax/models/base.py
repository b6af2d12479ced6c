"""The base class of all sequence models, and the only place where Flax NNX modules are turned into plain
pytrees of parameters and back.

`models/lru.py` is a short example of a model.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.data.batch import Batch
from rec_jax.hashing import Site
from rec_jax.nn.context import Block, Cache, Context
from rec_jax.nn.dense import dense
from rec_jax.nn.dims import dims_of
from rec_jax.nn.norm import LayerNorm, unit
from rec_jax.tables.embedding import Embedding


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Settings that all sequence models share. The config of a model adds its own settings and `type`, its
    name in config files."""

    width: int = 64
    num_layers: int = 2
    dropout: float = 0.1
    l2_normalize: bool = False  # cosine scores: query and item vectors are normalised to length 1
    temperature: float = 1.0  # scores are divided by it
    full_width: int = 0  # after pruning: the width before it, which norms and scales still use; 0 = width
    num_future: int = 1  # items to predict at each token in training: the next one, and those after it

    def __post_init__(self):
        self.check_minimums(width=1, num_layers=0, num_future=1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1) ({type(self).__name__})")
        if self.full_width and self.full_width < self.width:
            raise ValueError(
                f"full_width={self.full_width} must be 0 or at least width={self.width} "
                f"({type(self).__name__})"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive ({type(self).__name__})")

    def check_minimums(self, **minimums: int) -> None:
        """Raises ValueError if a field is below its minimum."""
        for name, minimum in minimums.items():
            if getattr(self, name) < minimum:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least {minimum} ({type(self).__name__})"
                )

    @property
    def table_dim(self) -> int:
        """The number of dims of an item vector."""
        return self.width

    @property
    def table_dim_name(self) -> str:
        """The name of these dims, see `nn.dims`."""
        return "width"

    @property
    def fixed_layers(self) -> str:
        """The reason why no layer can be removed from a trained model; "" if layers can be removed, because
        each only adds to its input."""
        return ""


class SequenceModel(nnx.Module):
    """Encodes packed rows in four stages, event encoder -> blocks -> norm -> query vectors. Scores are dot
    products of query vectors with the item embedding table, `self.items`.

    The constructor of a model sets `config`, `items` and `blocks` (a list of `nn.context.Block`), and, if the
    model has them, `positions` and `final_norm`. A model may override `look_up`, `inputs`, `stack` and
    `read_out`.
    """

    # True: the output at a token predicts the next event. False: the event to predict has a masked token, the
    # query token, which `batch.is_query` marks.
    is_causal = True
    # The event features that the model reads besides the items; the log must have them.
    columns: tuple[str, ...] = ()
    # True: a generative retrieval model. It has semantic ids, its own `loss` and a beam search instead of an
    # item embedding table.
    is_generative = False

    positions: Embedding | None = None
    final_norm: LayerNorm | None = None
    # {name: parameter path} of the embedding tables that may be large, and so sharded or updated sparsely.
    tables: dict[str, str] = {"items": "items/embedding"}

    def __call__(
        self,
        batch,
        key_B=None,
        query_positions=None,
        hidden: list | None = None,
        penalties: list | None = None,
    ) -> jax.Array:
        """Returns query vectors: x_BSD of all tokens, or x_QD of the tokens at `query_positions`.

        batch: must have the features in `columns`.
        key_B: uint32[B] from `hashing.row_keys` in training; None turns dropout off.
        query_positions: (rows int[Q], columns int[Q]) of the only tokens to return; needs key_B=None. Without
        it, all tokens are returned.
        hidden: a list to which the output of each layer is appended; with `query_positions`, that of the last
        layer is x_QD.
        penalties: a list to which, in training, a layer with a penalty appends it: f32[B], weighted and
        summed over the real tokens of each row. Penalties are added to the loss.
        """
        x = self.run(self.inputs(batch), self.context(batch, key_B), query_positions, hidden, penalties)
        return self.read_out(x)

    def look_up(self, batch):
        """Returns the embeddings of the events, [..., table_dim]."""
        return self.items(batch.lookup_ids("items", "events", batch.items))

    def inputs(self, batch):
        """Returns the input of the first block, before dropout."""
        x = self.look_up(batch) * (self.config.full_width or self.config.width) ** 0.5
        return x if self.positions is None else x + self.positions(batch.positions)

    def context(self, batch, key_B=None) -> Context:
        """Returns what blocks know of the tokens besides their vectors."""
        columns = {name: batch.events[name] for name in self.columns}
        return Context(batch.positions, batch.segments, columns, key_B)

    @property
    def stack(self) -> list[Block]:
        """The block of each layer, first layer first; a block that layers share is listed once per layer."""
        return list(self.blocks)

    def run(
        self,
        x_BSD,
        ctx: Context,
        query_positions=None,
        hidden: list | None = None,
        penalties: list | None = None,
    ):
        """Returns the output of the last block, given x_BSD, the input of the first. See `__call__`."""
        x, stack = ctx.dropout(x_BSD, Site.INPUT, self.config.dropout), self.stack
        for layer, block in enumerate(stack):
            x, penalty_B = block(x, ctx.of_layer(layer, query_positions if layer == len(stack) - 1 else None))
            if hidden is not None:
                hidden.append(x)
            if penalties is not None and penalty_B is not None:
                penalties.append(penalty_B)
        return x if query_positions is None or stack else x[query_positions]

    def read_out(self, x):
        """Returns query vectors, given outputs of the last block."""
        return self.queries(x if self.final_norm is None else self.final_norm(x))

    def prefill(self, batch, query_positions, room: int) -> tuple[jax.Array, Cache]:
        """Encodes N histories for step-by-step decoding; causal models only.

        Returns (x_ND, cache): the query vectors at the last event of each history, and a cache with free
        slots for `room` further events per continuation. query_positions: (rows int[N], columns int[N]) of
        the last events.
        """
        x, cache = self.fill(self.inputs(batch), self.context(batch), query_positions, room)
        return self.read_out(x), cache

    def fill(self, x_BSD, ctx: Context, query_positions, room: int) -> tuple[jax.Array, Cache]:
        """`run` without dropout, which also returns the cache. room: in tokens."""
        x, stack, layer_caches = x_BSD, self.stack, []
        for layer, block in enumerate(stack):
            layer_ctx = ctx.of_layer(layer, query_positions if layer == len(stack) - 1 else None)
            x, layer_cache = block.prefill(x, dataclasses.replace(layer_ctx, room=room), query_positions)
            layer_caches.append(layer_cache)
        cache = Cache.of(layer_caches, ctx.positions[query_positions] + 1, room)
        return x if stack else x[query_positions], cache

    def step(self, events: dict[str, jax.Array], cache: Cache) -> tuple[jax.Array, Cache]:
        """Appends one event to each of K continuations of the B histories in a cache.

        Returns (x_BKD, cache): the query vectors at the new events, and the cache after them. events: columns
        [B, K], named as in a batch; K may be larger than the cache's if that is 1. Up to max_len events,
        results equal those of the full forward pass. More than `room` events give NaN.
        """
        batch = Batch(events, segments=None, positions=cache.positions(events["item"].shape[1]))
        x_BKD, cache = self.advance(self.inputs(batch), self.context(batch), cache)
        return self.read_out(x_BKD), cache

    def advance(self, x_BKD, ctx: Context, cache: Cache) -> tuple[jax.Array, Cache]:
        """`run` for one new token of each continuation. Also returns the cache after it."""
        ctx, suffixes = dataclasses.replace(ctx, count=cache.count), []
        for layer, block in enumerate(self.stack):
            x_BKD, suffix = block.step(x_BKD, cache.prefix[layer], cache.suffix[layer], ctx.of_layer(layer))
            suffixes.append(suffix)
        x_BKD = jnp.where(jnp.reshape(cache.count, (-1, 1, 1)) < cache.room, x_BKD, jnp.nan)
        return x_BKD, cache.after(suffixes)

    def table_ids(self, batch, item_ids: dict) -> dict[str, dict]:
        """Returns {table: {use: int32 ids}}, the entries that a batch reads. A step gathers only these
        entries of the tables that are updated sparsely, and passes their indices on under the same names, in
        `batch.local_ids`.

        item_ids: {use: ids} of the items whose vectors the loss scores.
        """
        return {"items": {"events": batch.items} | item_ids}

    def loss(self, batch, key_B, score) -> tuple:
        """Returns (loss, x_BSD, penalty) of a micro-batch: the loss summed over the tokens with a target, the
        query vectors, and the sum of the layers' penalties.

        score: (x_BSD, outputs of the layers) -> the loss that the config names, summed over targets.
        """
        hidden, penalties = [], []
        x_BSD = self(batch, key_B, hidden=hidden, penalties=penalties)
        return score(x_BSD, hidden), x_BSD, sum(map(jnp.sum, penalties))

    def training_batch(self, batch, key_B):
        """Returns the batch that the model is trained on; models that mask items do so here."""
        return batch

    def queries(self, x):
        """Returns x [..., D], scaled such that dot products with `item_vectors()` are scores."""
        if self.config.l2_normalize:
            x = unit(x)
        return x / self.config.temperature

    def cut_queries(self, x, dims: int):
        """Returns the first dims of query vectors, normalised again if `l2_normalize` is set."""
        x = x[..., :dims]
        return unit(x) / self.config.temperature if self.config.l2_normalize else x

    def cut_items(self, table_VD, dims: int):
        """Returns the first dims of `item_vectors()`, normalised again if `l2_normalize` is set."""
        table_VD = table_VD[:, :dims]
        return unit(table_VD) if self.config.l2_normalize else table_VD

    def ahead(self, x_BSD, steps: int):
        """Returns query vectors for the item `steps` after the next one, given those for the next one."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        x_TD = x_TD + dense(x_TD, self.future[steps - 1].kernel[...]).astype(x_TD.dtype)
        return self.cut_queries(x_TD.reshape(x_BSD.shape), x_BSD.shape[-1])

    def item_vectors(self):
        """Returns the vectors of all items, [V, table_dim]; entry 0 is padding and must not be scored.

        A quantized table stays quantized, unless its entries have to be normalised."""
        table_VD = self.items.embedding[...]
        if not self.config.l2_normalize:
            return table_VD
        return unit(table_VD.dequantize() if hasattr(table_VD, "dequantize") else table_VD)


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a static argument of jit
class Model:
    """The definition of a module, without values of its parameters."""

    graphdef: Any
    abstract_params: Any
    is_causal: bool = True  # this and the next three: see SequenceModel
    columns: tuple[str, ...] = ()
    is_generative: bool = False
    tables: dict[str, str] = field(default_factory=dict)
    config: SequenceConfig | None = None
    dims: dict[str, tuple] = field(default_factory=dict)  # {parameter path: names of its dims}, see `nn.dims`

    def bind(self, params) -> SequenceModel:
        """Returns the module with these parameters. To be called inside the function that is compiled."""
        return nnx.merge(self.graphdef, nnx.State(params))


def define_model(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Returns the definition of a module. Shapes only: no parameter is computed."""
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graphdef, state = nnx.split(module, nnx.Param)
    abstract_params = jax.tree.map(_abstract, nnx.to_pure_dict(state))
    dims = {"/".join(map(str, path)): dims_of(x) for path, x in nnx.to_flat_state(state)}
    return Model(
        graphdef,
        abstract_params,
        module.is_causal,
        module.columns,
        module.is_generative,
        module.tables,
        module.config,
        dims,
    )


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def init_model(build: Callable[[nnx.Rngs], nnx.Module], seed: int) -> tuple[Model, dict]:
    """Returns the definition of a module and its initial parameters, a plain nested dict of arrays."""

    def make(key):
        return nnx.to_pure_dict(nnx.split(build(nnx.Rngs(params=key)), nnx.Param)[1])

    return define_model(build), jax.jit(make)(jax.random.key(seed))
