"""The context of a block (segments, positions, event columns) and the three ways to run a block: all tokens
of a row at once; all tokens at once while filling a cache; one new token at a time with that cache.

A block defines its computation once, in `apply`. Whatever reads other tokens is a mixer, an object with

    mixer(*inputs, ctx) -> y_BS...                                  all tokens
    mixer.prefill(*inputs, ctx, query_positions)                    all tokens, and the cache of N histories,
        -> (y_BS..., prefix, suffix)                                which end at `query_positions`
    mixer.step(*inputs, prefix, suffix, ctx) -> (y_BK..., suffix)   one new token for each of K continuations
                                                                    of B histories

prefix: the cached history, shared by all its continuations; arrays [N, ...], or None. suffix: the cached
tokens of each continuation; arrays [N, K, ...], with K = 1 after `prefill`. Reordering beams is a gather
along K.
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
    """Everything a block reads besides the vectors of its tokens.

    positions: int32[B, S] in the segments; [B, K] in a step. segments: int32[B, S], 0 = padding. columns:
    event features such as {"time": int32[B, S] seconds}; [B, K] in a step.
    key_B: uint32[B] from `hashing.row_keys` in training, otherwise None. layer: the index of the block in the
    stack. query_positions: (rows int[Q], columns int[Q]), the only tokens that the block returns, as x_QD;
    None = all tokens. room: in a prefill, the number of tokens that each continuation may add. count: in a
    step, the number of tokens that each continuation has added so far, an int or int32[B].
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
        """Returns the site of dropout `place` in 1..`of` of this layer, see `hashing.dropout_site`."""
        return dropout_site(self.layer, place, of)

    def dropout(self, x, site: int, rate: float):
        """Applies dropout in training; otherwise returns x."""
        return dropout_lib.dropout(x, self.key_B, site, rate) if self.is_training and rate else x

    def only(self, x):
        """Returns x at `query_positions`. Call it after the last mixer: later code needs no other token."""
        return x if self.query_positions is None else x[self.query_positions]

    def visible(self, query_positions) -> jax.Array:
        """bool[N, S]: whether a query attends to a token: to itself and earlier tokens of its segment."""
        rows_N, columns_N = query_positions
        segments_NS = self.segments[rows_N]
        is_past_NS = jnp.arange(segments_NS.shape[1]) <= columns_N[:, None]
        return is_past_NS & (segments_NS == self.segments[rows_N, columns_N][:, None])

    def empty_suffix(self, x_BSX, num: int):
        """Zeros [num, 1, room, ...]: a cache of x for the tokens that will continue `num` histories."""
        return jnp.zeros((num, 1, self.room, *x_BSX.shape[2:]), x_BSX.dtype)

    def append(self, suffix_BKCX, x_BKX):
        """Returns the suffix with the new token x at slot `count`."""
        is_new = jnp.arange(suffix_BKCX.shape[2]) == jnp.reshape(self.count, (-1, 1, 1))
        is_new = is_new.reshape(*is_new.shape, *[1] * (x_BKX.ndim - 2))
        return jnp.where(is_new, x_BKX[:, :, None], suffix_BKCX)

    def is_filled(self, room: int) -> jax.Array:
        """bool[B or 1, 1, room]: whether a slot of the suffix holds a token, the new token included."""
        return jnp.arange(room) <= jnp.reshape(self.count, (-1, 1, 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The cache of N histories and of the K continuations of each: one prefix and one suffix for each layer.

    position_N: int32, the position of the next token after each history. count: the number of tokens that
    each continuation has added, an int or int32[N]; at most `room`.
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
        """int32[N, num]: the position of the next token in each of `num` continuations."""
        return jnp.broadcast_to(self.position_N[:, None], (len(self.position_N), num))

    def after(self, suffix: list) -> "Cache":
        """Returns the cache after one more token, with its new suffix."""
        return dataclasses.replace(self, suffix=suffix, position_N=self.position_N + 1, count=self.count + 1)

    def fork(self, parent_NK) -> "Cache":
        """Returns the cache of K new continuations. parent_NK: the continuation that each one extends."""
        row_N1 = jnp.arange(len(parent_NK))[:, None]
        return dataclasses.replace(self, suffix=jax.tree.map(lambda x: x[row_N1, parent_NK], self.suffix))


class Block(nnx.Module):
    """One layer of a sequence model. `apply` defines its computation; it reads other tokens only by `mix`."""

    def apply(self, x_BSD, ctx: Context, mix):
        """Returns (x_BSD, penalty f32[B] or None). mix(mixer, *inputs) -> y. penalty: see SequenceModel."""
        raise NotImplementedError

    def __call__(self, x_BSD, ctx: Context):
        """Returns (x_BSD, or x_QD for ctx.query_positions; penalty f32[B] or None)."""
        return self.apply(x_BSD, ctx, lambda mixer, *inputs: mixer(*inputs, ctx))

    def prefill(self, x_BSD, ctx: Context, query_positions):
        """Returns (x_BSD, or x_QD for ctx.query_positions; (prefix, suffix)). The prefix and suffix cache the
        N histories whose last tokens are at the argument `query_positions`."""
        prefix, suffix = [], []

        def mix(mixer, *inputs):
            y, shared, added = mixer.prefill(*inputs, ctx, query_positions)
            prefix.append(shared)
            suffix.append(added)
            return y

        return self.apply(x_BSD, ctx, mix)[0], (prefix, suffix)

    def step(self, x_BKD, prefix, suffix, ctx: Context):
        """Returns (x_BKD, suffix) for one new token of each of the K continuations of B histories."""
        new = []

        def mix(mixer, *inputs):
            y, added = mixer.step(*inputs, prefix[len(new)], suffix[len(new)], ctx)
            new.append(added)
            return y

        return self.apply(x_BKD, ctx, mix)[0], new
