"""What a block knows of its tokens besides their vectors, and the three ways to run a block: all tokens of a
row at once; all at once while filling a cache; one new token at a time against that cache.

A block writes its computation once, in `apply`. What looks at other tokens is a mixer, an object with

    mixer(*inputs, ctx) -> y_BS...                              all tokens
    mixer.prefill(*inputs, ctx, at) -> (y_BS..., prefix, own)   the same, and the cache of the N histories at
                                                                `query_positions`
    mixer.step(*inputs, prefix, own, ctx) -> (y_BK..., own)     one new token for each of K continuations of B
                                                                histories

prefix: what all continuations of a history share, arrays [N, ...], or None. own: what each continuation has
added, arrays [N, K, ...], K = 1 after `prefill`; reordering the beams is a gather along K.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from rec_jax.hashing import dropout_site
from rec_jax.nn import dropout as dropout_lib


@dataclass(frozen=True)
class Context:
    """positions: int32[B, S] of the tokens in their segments; of a step [B, K]. segments: int32[B, S], 0 =
    padding. columns: raw columns of the events, {"time": int32[B, S] seconds}, [B, K] of a step.

    key_B: uint32[B] from `hashing.row_keys` in training, else None. layer: which application of a block this
    is. at: (rows int[Q], columns int[Q]) of the only tokens that the block is to return, as x_QD; None = all.
    room: of a prefill, the tokens that each continuation may add. count: of a step, the tokens that each has
    added so far, an int or int32[B].
    """

    positions: jax.Array
    segments: jax.Array | None = None
    columns: dict[str, jax.Array] = field(default_factory=dict)
    key_B: jax.Array | None = None
    layer: int = 0
    query_positions: tuple | None = None
    room: int = 0
    count: Any = 0

    @property
    def is_training(self) -> bool:
        return self.key_B is not None

    def of_layer(self, layer: int, query_positions: tuple | None = None) -> "Context":
        return dataclasses.replace(self, layer=layer, query_positions=query_positions)

    def site(self, place: int, of: int) -> int:
        """Of one of the dropouts 1..`of` of this layer, see `hashing.dropout_site`."""
        return dropout_site(self.layer, place, of)

    def dropout(self, x, site: int, rate: float):
        """Nothing but in training."""
        return dropout_lib.dropout(x, self.key_B, site, rate) if self.is_training and rate else x

    def only(self, x):
        """x_BSD at the tokens that are to be returned: what follows looks at one token at a time."""
        return x if self.query_positions is None else x[self.query_positions]

    def seen(self, query_positions) -> jax.Array:
        """bool[N, S]: the tokens of each row that its history at `query_positions` sees: itself and its segment's past."""
        rows_N, columns_N = query_positions
        segments_NS = self.segments[rows_N]
        is_past_NS = jnp.arange(segments_NS.shape[1]) <= columns_N[:, None]
        return is_past_NS & (segments_NS == self.segments[rows_N, columns_N][:, None])

    def empty(self, x_BSX, num: int):
        """Room for what the continuations of `num` histories will add of x: zeros [num, 1, room, ...]."""
        return jnp.zeros((num, 1, self.room, *x_BSX.shape[2:]), x_BSX.dtype)

    def added(self, suffix_BKCX, x_BKX):
        """own with the new token x in its place."""
        is_new = jnp.arange(suffix_BKCX.shape[2]) == jnp.reshape(self.count, (-1, 1, 1))
        is_new = is_new.reshape(*is_new.shape, *[1] * (x_BKX.ndim - 2))
        return jnp.where(is_new, x_BKX[:, :, None], suffix_BKCX)

    def is_added(self, room: int) -> jax.Array:
        """bool[B or 1, 1, room]: the places of own that are filled, the new token's among them."""
        return jnp.arange(room) <= jnp.reshape(self.count, (-1, 1, 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What a model keeps of N histories and of the K continuations of each: prefix and own of every layer.

    position_N: int32, of each history's next token. count: the tokens that each continuation has added, an
    int or int32[N], of at most `room`.
    """

    prefix: list
    suffix: list
    position_N: jax.Array
    count: Any
    room: int = field(metadata={"static": True})

    @classmethod
    def of(cls, layers: list, position_N, room: int) -> "Cache":
        return cls([prefix for prefix, _ in layers], [suffix for _, suffix in layers], position_N, 0, room)

    def positions(self, num: int) -> jax.Array:
        """int32[N, num], of the next token of so many continuations."""
        return jnp.broadcast_to(self.position_N[:, None], (len(self.position_N), num))

    def after(self, suffix: list) -> "Cache":
        """The cache after one more token."""
        return dataclasses.replace(self, suffix=suffix, position_N=self.position_N + 1, count=self.count + 1)

    def fork(self, parent_NK) -> "Cache":
        """K continuations that go on from these ones: int[N, K]."""
        row_N1 = jnp.arange(len(parent_NK))[:, None]
        return dataclasses.replace(self, suffix=jax.tree.map(lambda x: x[row_N1, parent_NK], self.suffix))


class Block(nnx.Module):
    """One layer of a sequence model: what it computes is `apply`, in which everything that looks at other
    tokens goes through `mix`."""

    def apply(self, x_BSD, ctx: Context, mix):
        """(x_BSD, penalty f32[B] or None). mix(mixer, *inputs) -> y. penalty: see SequenceModel."""
        raise NotImplementedError

    def __call__(self, x_BSD, ctx: Context):
        """(x_BSD, or x_QD for ctx.query_positions; penalty f32[B] or None)."""
        return self.apply(x_BSD, ctx, lambda mixer, *inputs: mixer(*inputs, ctx))

    def prefill(self, x_BSD, ctx: Context, query_positions):
        """(x_BSD, or x_QD for ctx.query_positions; cache of the N histories whose last tokens are at `query_positions`), where the
        cache is (prefix, own)."""
        prefix, suffix = [], []

        def mix(mixer, *inputs):
            y, shared, added = mixer.prefill(*inputs, ctx, query_positions)
            prefix.append(shared)
            suffix.append(added)
            return y

        return self.apply(x_BSD, ctx, mix)[0], (prefix, suffix)

    def step(self, x_BKD, prefix, suffix, ctx: Context):
        """(x_BKD, own) of one new token for each of K continuations of B histories."""
        new = []

        def mix(mixer, *inputs):
            y, added = mixer.step(*inputs, prefix[len(new)], suffix[len(new)], ctx)
            new.append(added)
            return y

        return self.apply(x_BKD, ctx, mix)[0], new
