"""Generative retrieval: a causal transformer that writes the codes of the next item one by one."""

from dataclasses import dataclass
from typing import Literal

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.models.base import SequenceConfig, SequenceModel
from rec_jax.models.semantic_ids import SemanticIds
from rec_jax.nn.blocks import TransformerBlock, TransformerShape
from rec_jax.nn.context import Context
from rec_jax.nn.dims import named
from rec_jax.nn.norm import LayerNorm
from rec_jax.tables.embedding import Embedding

# Where a level has at most so many nodes for each child that a node may have, a matrix product with all of
# them and a choice among its results is faster than gathering the vectors of children (LOG.md, 2026-11-27).
_PRODUCTS = 64


@dataclass(frozen=True, kw_only=True)
class TigerConfig(SequenceConfig):
    type: Literal["tiger"] = "tiger"
    num_heads: int = 2
    ff_width: int = 256
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    norm: Literal["pre", "post", "original"] = "pre"
    prefix_embeddings: bool = (
        False  # a vector for each beginning of codes that items have, besides those of its codes
    )
    num_beams: int = 50  # items found for a history, seen ones among them; all others score -inf

    def __post_init__(self):
        super().__post_init__()
        self.at_least(num_heads=1, ff_width=1, num_beams=1)
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide width={self.width} (TigerConfig)")
        if self.l2_normalize:
            raise ValueError("l2_normalize=True needs item vectors, and this model has none (TigerConfig)")

    @property
    def fixed_layers(self) -> str:
        return "" if self.norm == "pre" else f"under norm={self.norm!r} a layer normalises what passes it by"

    def block_shape(self) -> TransformerShape:
        return TransformerShape(
            width=self.width,
            num_heads=self.num_heads,
            head_width=self.width // self.num_heads,
            ff_width=self.ff_width,
            activation=self.activation,
            dropout=self.dropout,
            norm=self.norm,
            full_width=self.full_width,
        )


class Tiger(SequenceModel):
    """Every item is Q tokens: its codes but for the last, and then the whole item, the sum of all its codes.

    So from the token of a whole item on, Q tokens predict the Q codes of the next item: the item itself, and
    the next item's codes but for the last. The transformer sees S * Q tokens, of which those at s * Q stand
    for whole items; `__call__` returns these.

    Source: TIGER, Rajput et al., NeurIPS'23 (arXiv 2305.05065).
    Differs: a causal transformer that learns from every item of a history, for an encoder and a decoder; the
    last code of an item comes with the others; no token of the user; a softmax is over the codes that may
    follow. prefixes: Singh et al., RecSys'24 (arXiv 2306.08121), without hashing, and on both sides; the last
    of them is a vector of the item.
    """

    is_generative = True
    tables = {}

    def __init__(
        self, config: TigerConfig, num_items: int, max_len: int, *, semantic_ids: SemanticIds, rngs: nnx.Rngs
    ):
        self.config, self.semantic_ids = config, semantic_ids
        if len(semantic_ids.codes_VQ) != num_items + 1:
            raise ValueError(
                f"there are codes of {len(semantic_ids.codes_VQ) - 1} items, and {num_items} items"
            )
        num_places = (
            semantic_ids.num_levels * semantic_ids.codebook_size
        )  # row 0 of both tables stands for no item
        self.code_table = named(Embedding(1 + num_places, config.width, rngs=rngs), "codes", "width")
        if config.prefix_embeddings:
            num_nodes = [len(codes_of) for codes_of in semantic_ids.trie.codes]
            self.first_nodes = tuple(1 + sum(num_nodes[:level]) for level in range(semantic_ids.num_levels))
            self.nodes = named(Embedding(1 + sum(num_nodes), config.width, rngs=rngs), "nodes", "width")
        self.positions = named(Embedding(max_len, config.width, rngs=rngs), "positions", "width")
        self.slots = named(Embedding(semantic_ids.num_levels, config.width, rngs=rngs), "levels", "width")
        self.blocks = nnx.List(
            [TransformerBlock(config.block_shape(), rngs=rngs) for _ in range(config.num_layers)]
        )
        self.final_norm = LayerNorm(config.width, config.full_width)

    def __call__(self, batch, key_B=None, query_positions=None, hidden=None):
        """See SequenceModel; the outputs at whole items."""
        num_levels = self.semantic_ids.num_levels
        if query_positions is not None:
            query_positions = query_positions[0], query_positions[1] * num_levels
        x = self.read_out(self.run(self.inputs(batch), self.context(batch, key_B), query_positions, hidden))
        return x if query_positions is not None else x[:, ::num_levels]

    def inputs(self, batch):
        return self._embed(batch, _following(batch))

    def context(self, batch, key_B=None) -> Context:
        num_levels, segments_BS = self.semantic_ids.num_levels, batch.segments
        positions_BSQ = batch.positions[..., None] * num_levels + jnp.arange(num_levels)
        segments_BT = jnp.repeat(segments_BS, num_levels, axis=1)
        return Context(positions_BSQ.reshape(segments_BT.shape), segments_BT, key_B=key_B)

    def read_out(self, x):
        """Outputs, which `log_probs` scales."""
        return self.final_norm(x)

    def loss(self, batch, key_B, score):
        """See SequenceModel: the sum over targets of -log p(item), where p is the product over its codes."""
        targets_BS = batch.targets
        ahead_BS = jnp.where(targets_BS > 0, targets_BS, _following(batch))
        x_BTD = self.run(self._embed(batch, ahead_BS), self.context(batch, key_B))
        x_BTD = self.read_out(x_BTD)
        x_BSQD = x_BTD.reshape(*targets_BS.shape, self.semantic_ids.num_levels, -1)
        paths_BSQ = jnp.asarray(self.semantic_ids.trie.paths_VQ)[targets_BS]
        real_BS = targets_BS > 0
        loss, node_BS = 0.0, jnp.zeros_like(targets_BS)
        for level in range(self.semantic_ids.num_levels):
            log_probs_BSM = self.log_probs(x_BSQD[:, :, level], node_BS, level)
            child_BS = paths_BSQ[..., level]
            place_BS = child_BS - jnp.asarray(self.semantic_ids.trie.first[level])[node_BS]
            chosen_BS = jnp.take_along_axis(log_probs_BSM, place_BS[..., None], axis=-1)[..., 0]
            loss -= jnp.sum(jnp.where(real_BS, chosen_BS, 0))
            node_BS = child_BS
        return loss, None, 0

    def log_probs(self, x, nodes, level: int):
        """f32[..., M] of the children of `nodes` [...], in their order, -inf behind the last of them.

        x: [..., D], the outputs of the tokens before. A child is scored by the vector of its code, and by its
        own, if prefixes have vectors; the sum is over the codes that may follow, so over all items
        probabilities sum to 1.
        """
        trie, first = self.semantic_ids.trie, jnp.asarray(self.semantic_ids.trie.first[level])
        children = first[nodes][..., None] + jnp.arange(trie.most[level])
        is_child = children < first[nodes + 1][..., None]
        children = jnp.where(is_child, children, 0)
        x = self.queries(x)

        def scores(vectors_XD):
            return jnp.matmul(x, vectors_XD.T.astype(x.dtype), preferred_element_type=jnp.float32)

        start = 1 + level * self.semantic_ids.codebook_size
        of_codes = scores(_entries(self.code_table, start, self.semantic_ids.codebook_size))
        logits = jnp.take_along_axis(of_codes, jnp.asarray(trie.codes[level])[children], axis=-1)
        if self.config.prefix_embeddings:
            start, num_nodes = self.first_nodes[level], len(trie.codes[level])
            vectors_XD = _entries(self.nodes, start, num_nodes)
            if num_nodes <= _PRODUCTS * trie.most[level]:
                logits += jnp.take_along_axis(scores(vectors_XD), children, axis=-1)
            else:
                of_children = vectors_XD[children].astype(x.dtype)
                logits += jnp.einsum("...d,...md->...m", x, of_children, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(jnp.where(is_child, logits, -jnp.inf), axis=-1)

    def prefill(self, batch, query_positions, room: int):
        num_levels = self.semantic_ids.num_levels
        query_positions = query_positions[0], query_positions[1] * num_levels
        x, cache = self.fill(self.inputs(batch), self.context(batch), query_positions, room * num_levels)
        return self.read_out(x), cache

    def step(self, events, cache):
        items_BK = events["item"]
        paths, codes = (
            jnp.asarray(self.semantic_ids.trie.paths_VQ)[items_BK],
            jnp.asarray(self.semantic_ids.codes_VQ)[items_BK],
        )
        for level in range(self.semantic_ids.num_levels - 1):
            cache = self.decode(codes[..., level], paths[..., level], level, cache)[1]
        return self._advance(jnp.sum(self._vectors(items_BK), axis=-2), cache)

    def decode(self, codes_NK, nodes_NK, level: int, cache):
        """(x_NKD, cache): one more token, the next item's code of `level`, for each of K continuations.

        nodes_NK: of the trie, where the codes so far lead."""
        x_NKD = self.code_table(1 + level * self.semantic_ids.codebook_size + codes_NK)
        if self.config.prefix_embeddings:
            x_NKD += self.nodes(self.first_nodes[level] + nodes_NK)
        return self._advance(x_NKD, cache)

    def _advance(self, x_NKD, cache):
        tokens_NK, num_levels = cache.positions(x_NKD.shape[1]), self.semantic_ids.num_levels
        x_NKD = self._placed(x_NKD, tokens_NK // num_levels, tokens_NK % num_levels)
        x_NKD, cache = self.advance(x_NKD, Context(tokens_NK), cache)
        return self.read_out(x_NKD), cache

    def _placed(self, x, positions, slots):
        scale = (self.config.full_width or self.config.width) ** 0.5
        return x * scale + self.positions(positions) + self.slots(slots)

    def _vectors(self, items):
        """What stands for the codes of items, [..., Q, D]."""

        def rows(first_Q, numbers_VQ):
            rows_VQ = np.asarray(first_Q) + numbers_VQ
            rows_VQ[0] = 0
            return jnp.asarray(rows_VQ)[items]

        semantic_ids = self.semantic_ids
        x = self.code_table(
            rows(1 + np.arange(semantic_ids.num_levels) * semantic_ids.codebook_size, semantic_ids.codes_VQ)
        )
        return (
            x + self.nodes(rows(self.first_nodes, semantic_ids.trie.paths_VQ))
            if self.config.prefix_embeddings
            else x
        )

    def _embed(self, batch, ahead_BS):
        """x_BTD, T = S * Q tokens. ahead_BS: the next items, 0 where they are not known."""
        whole_BSD = jnp.sum(self._vectors(batch.items), axis=2)
        ahead_BSQD = self._vectors(ahead_BS)[:, :, :-1]
        x_BSQD = jnp.concatenate([whole_BSD[:, :, None], ahead_BSQD], axis=2)
        x_BSQD = self._placed(x_BSQD, batch.positions[..., None], jnp.arange(self.semantic_ids.num_levels))
        return x_BSQD.reshape(x_BSQD.shape[0], -1, x_BSQD.shape[-1])


def _entries(table: Embedding, first: int, num: int):
    """vectors [num, D] of neighbouring entries, of a table that may be quantized."""
    table_XD = table.embedding[...]
    if isinstance(table_XD, jax.Array):
        return table_XD[first : first + num]
    return table_XD.rows(first + jnp.arange(num))


def _following(batch):
    """The next item of each token's segment, 0 at its end."""

    def shift(x_BS):
        return jnp.pad(x_BS[:, 1:], ((0, 0), (0, 1)))

    return jnp.where(shift(batch.segments) == batch.segments, shift(batch.items), 0)
