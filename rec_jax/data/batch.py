"""Batch: packed rows of histories, with everything that a model and its loss read."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from rec_jax.data.schema import Schema

_TOKEN_ALIGNED = ("events", "next", "users", "labels", "segments", "positions", "is_query", "weights")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """B rows of S tokens. A row contains the events of several histories, one segment each, then padding.

    All arrays except row_ids, local_ids and views are [B, S]. Code that moves, drops or hides tokens treats
    them all alike, so a new column needs no code here.

    events: columns of the event at each token: "item", int32 ids (0 = padding, or hidden), and the features
      of the schema that the model reads.
    next: columns of the event to predict at each token: "item", the target (0 = no target), and the context
      features of the schema.
    segments: int32, 1, 2, ... within a row, 0 = padding. positions: int32, from 0 in each segment.
    users, labels: other columns, one value per token (a packed row contains several users).
    is_query: bool, whether the token is a query position (bidirectional models); None for causal models.
    weights: f32, one weight per target; None = 1.
    row_ids: int32[B], the number of each row in the batch of all devices; it seeds the row's random numbers.
    local_ids: {table: {use: int32}} for tables of which only some entries were read: the index of each id
      among the entries read for its use. The ids themselves do not change.
    views: augmented copies, for a contrastive loss.
    """

    events: dict[str, jax.Array]
    segments: jax.Array
    positions: jax.Array
    next: dict[str, jax.Array] = field(default_factory=dict)
    users: dict[str, jax.Array] = field(default_factory=dict)
    labels: dict[str, jax.Array] = field(default_factory=dict)
    is_query: jax.Array | None = None
    weights: jax.Array | None = None
    row_ids: jax.Array | None = None
    local_ids: dict[str, dict[str, Any]] = field(default_factory=dict)
    views: tuple["Batch", ...] = ()
    schema: Schema = field(default=(), metadata={"static": True})

    @property
    def items(self) -> jax.Array:
        return self.events["item"]

    @property
    def targets(self) -> jax.Array:
        return self.next["item"]

    def lookup_ids(self, table: str, use: str, ids):
        """The index of each id among the table entries that were read for a use; the ids themselves if the
        whole table is available."""
        return self.local_ids[table][use] if table in self.local_ids else ids

    def replace(self, **changes) -> "Batch":
        return dataclasses.replace(self, **changes)

    def with_items(self, items_BS) -> "Batch":
        return self.replace(events={**self.events, "item": items_BS})

    def with_targets(self, targets_BS) -> "Batch":
        return self.replace(next={**self.next, "item": targets_BS})

    def map_tokens(self, change) -> "Batch":
        """Applies change(array) to every token-aligned array."""
        parts = {name: getattr(self, name) for name in _TOKEN_ALIGNED}
        return self.replace(**jax.tree.map(change, parts))

    def keep(self, is_kept_BS) -> "Batch":
        """Replaces all tokens that are not kept by padding."""
        return self.map_tokens(lambda x: jnp.where(is_kept_BS, x, jnp.zeros((), x.dtype)))

    def hide(self, hidden_BS) -> "Batch":
        """Hides the items of some tokens and their outcome features, which would reveal the items."""
        outcomes = {feature.name: feature.missing for feature in self.schema if feature.is_outcome}
        missing = {"item": 0} | outcomes
        events = {
            name: jnp.where(hidden_BS, jnp.asarray(missing[name], x.dtype), x) if name in missing else x
            for name, x in self.events.items()
        }
        return self.replace(events=events)

    def shift_targets(self, steps: int) -> "Batch":
        """Replaces the target of each token by the target `steps` tokens later in its segment, or 0 if the
        segment ends before. Context features and weights move with the targets."""

        def later(x_BS):
            return jnp.pad(x_BS[:, steps:], ((0, 0), (0, steps)))

        is_same_BS = (self.segments > 0) & (later(self.segments) == self.segments)
        moved = {name: jnp.where(is_same_BS, later(x), 0) for name, x in self.next.items()}
        weights = None if self.weights is None else jnp.where(is_same_BS, later(self.weights), 0)
        local_ids = {
            table: {
                use: jnp.where(is_same_BS, later(x), 0) if use == "targets" else x for use, x in uses.items()
            }
            for table, uses in self.local_ids.items()
        }
        return self.replace(next=moved, weights=weights, local_ids=local_ids)


def select(choice_BS, batches: list[Batch]) -> Batch:
    """Returns a batch that takes each token from batches[choice_BS]."""

    def pick(*arrays):
        chosen = arrays[0]
        for index, x in enumerate(arrays[1:], 1):
            chosen = jnp.where(choice_BS == index, x, chosen)
        return chosen

    parts = [{name: getattr(batch, name) for name in _TOKEN_ALIGNED} for batch in batches]
    return batches[0].replace(**jax.tree.map(pick, *parts))
