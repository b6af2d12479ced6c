"""A batch of packed rows: all that a model and its loss read of some histories."""

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
    """B rows of S tokens. A row holds the events of several histories, one segment each, then padding.

    Every array but row_ids, local_ids and views is [B, S], so whatever moves, drops or hides tokens treats them
    alike; a new column needs no code here.

    events: columns of the event at each token: "item", int32 ids (0 = padding, or hidden), and the features
      of the schema that the model reads.
    next: what is known of the event to predict at each token: "item", the target (0 = nothing to learn),
      and the context features of the schema.
    segments: int32, 1, 2, ... within a row, 0 = padding. positions: int32, from 0 in each segment.
    users, labels: further columns by token (a packed row holds several users).
    is_query: bool, the tokens that stand for an event to predict, of models that see both sides; else None.
    weights: f32 of the targets; None = 1.
    row_ids: int32[B], the number of each row in the batch of all devices; random numbers follow from it.
    local_ids: {table: {use: int32}} for tables of which only some entries were read: where each id of a use is
      among them. The ids themselves stay.
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
        """Where the ids of a use are among the entries of a table that were read; the ids themselves where
        the whole table is at hand."""
        return self.local_ids[table][use] if table in self.local_ids else ids

    def replace(self, **changes) -> "Batch":
        return dataclasses.replace(self, **changes)

    def with_items(self, items_BS) -> "Batch":
        return self.replace(events={**self.events, "item": items_BS})

    def with_targets(self, targets_BS) -> "Batch":
        return self.replace(next={**self.next, "item": targets_BS})

    def map_tokens(self, change) -> "Batch":
        """The batch with change(array) for every token-aligned array."""
        parts = {name: getattr(self, name) for name in _TOKEN_ALIGNED}
        return self.replace(**jax.tree.map(change, parts))

    def keep(self, is_kept_BS) -> "Batch":
        """Padding in place of all other tokens."""
        return self.map_tokens(lambda x: jnp.where(is_kept_BS, x, jnp.zeros((), x.dtype)))

    def hide(self, hidden_BS) -> "Batch":
        """The batch without the items of some tokens, nor anything else that gives them away."""
        outcomes = {feature.name: feature.missing for feature in self.schema if feature.is_outcome}
        missing = {"item": 0} | outcomes
        events = {
            name: jnp.where(hidden_BS, jnp.asarray(missing[name], x.dtype), x) if name in missing else x
            for name, x in self.events.items()
        }
        return self.replace(events=events)

    def shift_targets(self, steps: int) -> "Batch":
        """The batch with, at each token, what is to be predicted `steps` tokens later in its segment; targets
        are 0 where there is none."""

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
    """At each token what batches[choice] have there."""

    def pick(*arrays):
        chosen = arrays[0]
        for index, x in enumerate(arrays[1:], 1):
            chosen = jnp.where(choice_BS == index, x, chosen)
        return chosen

    parts = [{name: getattr(batch, name) for name in _TOKEN_ALIGNED} for batch in batches]
    return batches[0].replace(**jax.tree.map(pick, *parts))
