"""The one place where Flax NNX modules become plain pytrees and back."""

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
    """What every sequence model has; its own config adds `type`, by which a config file names the model."""

    width: int = 64
    num_layers: int = 2
    dropout: float = 0.1
    l2_normalize: bool = False  # score by cosine: both sides normalised to length 1
    temperature: float = 1.0  # scores are divided by it
    full_width: int = 0  # the width before dims were removed, which norms and scales still count; 0 = width
    num_future: int = 1  # items that training predicts at each token: the next and those after it

    def __post_init__(self):
        self.at_least(width=1, num_layers=0, num_future=1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1) ({type(self).__name__})")
        if self.full_width and self.full_width < self.width:
            raise ValueError(
                f"full_width={self.full_width} must be 0 or at least width={self.width} "
                f"({type(self).__name__})"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive ({type(self).__name__})")

    def at_least(self, **least: int) -> None:
        """Raises ValueError for a field below its number."""
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least {number} ({type(self).__name__})"
                )

    @property
    def table_dim(self) -> int:
        """Dims of item vectors."""
        return self.width

    @property
    def table_dim_name(self) -> str:
        """Their name, see `nn.dims`."""
        return "width"

    @property
    def fixed_layers(self) -> str:
        """Why no layer can be left out; "" where each adds to its input."""
        return ""


class SequenceModel(nnx.Module):
    """Encodes packed rows, event encoder -> blocks -> norm -> query, and scores the catalogue by dot products
    with its item embedding table, `self.items`.

    A model makes its parts in __init__: config, items, blocks (`nn.context.Block`), and positions and
    final_norm where it has them. It may override `look_up`, `inputs`, `stack` and `read_out`.
    """

    # Does the output at a token predict the next one? Else the event to predict has a masked token of its
    # own: `batch.is_query` says which.
    is_causal = True
    # Features of the events that the model reads beside the items; a log must have them.
    columns: tuple[str, ...] = ()
    # Has no item embedding table, but `codes`, a `loss(batch, key_B)` and a beam search instead.
    is_generative = False

    positions: Embedding | None = None
    final_norm: LayerNorm | None = None
    # {name: path of the parameter} of its embedding tables that may be large.
    tables: dict[str, str] = {"items": "items/embedding"}

    def __call__(
        self,
        batch,
        key_B=None,
        query_positions=None,
        hidden: list | None = None,
        penalties: list | None = None,
    ) -> jax.Array:
        """x_BSD, or x_QD for `query_positions`, scaled by `queries`.

        batch: with the features in `columns`.
        key_B: uint32[B] from `hashing.row_keys`, or None for no dropout. at: (rows int[Q], columns int[Q]) of
        the only tokens to return, without dropout; or None. hidden: a list to which the output of each layer
        is appended; with `query_positions` the last of them is x_QD. penalties: a list to which layers, given a key_B,
        append what they add to the training loss, f32[B], weighted and summed over the real tokens of a row.
        """
        x = self.run(self.inputs(batch), self.context(batch, key_B), query_positions, hidden, penalties)
        return self.read_out(x)

    def look_up(self, batch):
        """The vectors of the events, [..., table_dim]."""
        return self.items(batch.lookup_ids("items", "events", batch.items))

    def inputs(self, batch):
        """What the first block sees, before dropout."""
        x = self.look_up(batch) * (self.config.full_width or self.config.width) ** 0.5
        return x if self.positions is None else x + self.positions(batch.positions)

    def context(self, batch, key_B=None) -> Context:
        columns = {name: batch.events[name] for name in self.columns}
        return Context(batch.positions, batch.segments, columns, key_B)

    @property
    def stack(self) -> list[Block]:
        """The block of each layer; a shared one several times."""
        return list(self.blocks)

    def run(
        self,
        x_BSD,
        ctx: Context,
        query_positions=None,
        hidden: list | None = None,
        penalties: list | None = None,
    ):
        """The output of the last block. Arguments as of `__call__`."""
        x, stack = ctx.dropout(x_BSD, Site.INPUT, self.config.dropout), self.stack
        for layer, block in enumerate(stack):
            x, penalty_B = block(x, ctx.of_layer(layer, query_positions if layer == len(stack) - 1 else None))
            if hidden is not None:
                hidden.append(x)
            if penalties is not None and penalty_B is not None:
                penalties.append(penalty_B)
        return x if query_positions is None or stack else x[query_positions]

    def read_out(self, x):
        """Queries from outputs of the last block."""
        return self.queries(x if self.final_norm is None else self.final_norm(x))

    def prefill(self, batch, query_positions, room: int) -> tuple[jax.Array, Cache]:
        """(x_ND at the last events of N histories, a cache to which each of their continuations may add
        `room` events). Causal models only. at: (rows int[N], columns int[N])."""
        x, cache = self.fill(self.inputs(batch), self.context(batch), query_positions, room)
        return self.read_out(x), cache

    def fill(self, x_BSD, ctx: Context, query_positions, room: int) -> tuple[jax.Array, Cache]:
        """`run` without dropout, and the cache; room: in tokens."""
        x, stack, layers = x_BSD, self.stack, []
        for layer, block in enumerate(stack):
            layer_ctx = ctx.of_layer(layer, query_positions if layer == len(stack) - 1 else None)
            x, cache = block.prefill(x, dataclasses.replace(layer_ctx, room=room), query_positions)
            layers.append(cache)
        return x if stack else x[query_positions], Cache.of(layers, ctx.positions[query_positions] + 1, room)

    def step(self, events: dict[str, jax.Array], cache: Cache) -> tuple[jax.Array, Cache]:
        """(x_BKD, cache): one more event for each of K continuations of the cache's B histories.

        K may grow from 1. events: columns [B, K], as those of a batch. Equals the full forward pass up to
        max_len events; more than `room` events give NaN.
        """
        batch = Batch(events, segments=None, positions=cache.positions(events["item"].shape[1]))
        x_BKD, cache = self.advance(self.inputs(batch), self.context(batch), cache)
        return self.read_out(x_BKD), cache

    def advance(self, x_BKD, ctx: Context, cache: Cache) -> tuple[jax.Array, Cache]:
        """`run` for one new token of each continuation."""
        ctx, suffix = dataclasses.replace(ctx, count=cache.count), []
        for layer, block in enumerate(self.stack):
            x_BKD, new = block.step(x_BKD, cache.prefix[layer], cache.suffix[layer], ctx.of_layer(layer))
            suffix.append(new)
        x_BKD = jnp.where(jnp.reshape(cache.count, (-1, 1, 1)) < cache.room, x_BKD, jnp.nan)
        return x_BKD, cache.after(suffix)

    def table_ids(self, batch, item_ids: dict) -> dict[str, dict]:
        """{table: {use: int32 ids}}: the entries that a batch reads, where only these are at hand.

        item_ids: {use: ids} of the items whose vectors the loss scores. `batch.local_ids` then says under the
        same names where they are.
        """
        return {"items": {"events": batch.items} | item_ids}

    def loss(self, batch, key_B, score) -> tuple:
        """(sum of the loss over tokens with a target, query vectors x_BSD, penalty to add) of a micro-batch.

        score: (x_BSD, hidden states of the layers) -> the sum of the loss that the config names.
        """
        hidden, penalties = [], []
        x_BSD = self(batch, key_B, hidden=hidden, penalties=penalties)
        return score(x_BSD, hidden), x_BSD, sum(map(jnp.sum, penalties))

    def training_batch(self, batch, key_B):
        """The batch as this model learns from it."""
        return batch

    def queries(self, x):
        """[..., D], scaled so that a dot product with `item_vectors()` is the score."""
        if self.config.l2_normalize:
            x = unit(x)
        return x / self.config.temperature

    def cut_queries(self, x, dims: int):
        """The first dims of what `queries` returned, normalised again where that is."""
        x = x[..., :dims]
        return unit(x) / self.config.temperature if self.config.l2_normalize else x

    def cut_items(self, table_VD, dims: int):
        """The first dims of `item_vectors()`, normalised again where they are."""
        table_VD = table_VD[:, :dims]
        return unit(table_VD) if self.config.l2_normalize else table_VD

    def ahead(self, x_BSD, steps: int):
        """Queries for the item `steps` after the next one, from those for the next one."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        x_TD = x_TD + dense(x_TD, self.future[steps - 1].kernel[...]).astype(x_TD.dtype)
        return self.cut_queries(x_TD.reshape(x_BSD.shape), x_BSD.shape[-1])

    def item_vectors(self):
        """The catalogue as table_VD, [V, table_dim]; row 0 is padding and must not be scored.

        A quantized table is returned as it is, unless its rows are to be normalised."""
        table_VD = self.items.embedding[...]
        if not self.config.l2_normalize:
            return table_VD
        return unit(table_VD.dequantize() if hasattr(table_VD, "dequantize") else table_VD)


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a static argument of jit
class Model:
    """A module's definition: `bind(params)` gives the module, at trace time only."""

    graphdef: Any
    abstract_params: Any
    is_causal: bool = True  # these as of the module's class
    columns: tuple[str, ...] = ()
    is_generative: bool = False
    tables: dict[str, str] = field(default_factory=dict)
    config: SequenceConfig | None = None
    dims: dict[str, tuple] = field(default_factory=dict)  # of each parameter, see `nn.dims`

    def bind(self, params) -> SequenceModel:
        return nnx.merge(self.graphdef, nnx.State(params))


def define_model(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """The definition alone; computes nothing."""
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
    """The definition and freshly initialised parameters, a plain nested dict of arrays."""

    def make(key):
        return nnx.to_pure_dict(nnx.split(build(nnx.Rngs(params=key)), nnx.Param)[1])

    return define_model(build), jax.jit(make)(jax.random.key(seed))
