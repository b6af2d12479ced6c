"""TIGER: generative retrieval by a causal transformer that predicts the codes of the next item one by one."""

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

# If the number of nodes of a level, divided by its max_children, is at most this, it is faster to score all
# nodes by one matrix product and pick the children's scores than to gather the children's vectors (LOG.md,
# 2026-11-27).
_PRODUCTS = 64


@dataclass(frozen=True, kw_only=True)
class TigerConfig(SequenceConfig):
    type: Literal["tiger"] = "tiger"
    num_heads: int = 2
    ff_width: int = 256
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    norm: Literal["pre", "post", "original"] = "pre"
    prefix_embeddings: bool = False  # every node of the trie has a vector, in addition to that of its code
    num_beams: int = 50  # items that a beam search returns, those of the history included; others score -inf

    def __post_init__(self):
        super().__post_init__()
        self.check_minimums(num_heads=1, ff_width=1, num_beams=1)
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide width={self.width}: change one of them "
                "(TigerConfig)"
            )
        if self.l2_normalize:
            raise ValueError(
                "l2_normalize=True needs item vectors, and this model has none: turn it off (TigerConfig)"
            )

    @property
    def fixed_layers(self) -> str:
        if self.norm == "pre":
            return ""
        return f"with norm={self.norm!r} a layer also normalises its residual branch"

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
    """Represents an item with Q codes by Q tokens: one for each code except the last, then one for the whole
    item, whose vector is the sum over all its codes.

    The Q tokens that start with a whole item predict the Q codes of the next item: the whole item predicts
    the first code, and the token of each code predicts the code after it. The transformer reads S * Q tokens,
    and those at s * Q are whole items. `__call__` returns the outputs at whole items.

    Source: TIGER, Rajput et al., NeurIPS'23 (arXiv 2305.05065).
    Differs: a causal transformer, trained on every item of a history, instead of an encoder and a decoder;
    the last code is not a token, but part of the whole item; no user token; each softmax is over the codes
    that may follow the prefix.
    prefix_embeddings: Singh et al., RecSys'24 (arXiv 2306.08121), without hashing, and for inputs and scores;
    the vector of the longest prefix is the item's own.
    """

    is_generative = True
    tables = {}

    def __init__(
        self, config: TigerConfig, num_items: int, max_len: int, *, semantic_ids: SemanticIds, rngs: nnx.Rngs
    ):
        self.config, self.semantic_ids = config, semantic_ids
        if len(semantic_ids.codes_VQ) != num_items + 1:
            raise ValueError(
                f"num_items={num_items}, but there are semantic ids of {len(semantic_ids.codes_VQ) - 1} "
                "items: use semantic ids made for this log (Tiger)"
            )
        # Entry 0 of code_table and nodes stands for no item.
        num_codes = semantic_ids.num_levels * semantic_ids.codebook_size
        self.code_table = named(Embedding(1 + num_codes, config.width, rngs=rngs), "codes", "width")
        if config.prefix_embeddings:
            num_nodes = [len(codes) for codes in semantic_ids.trie.codes]
            self.first_nodes = tuple(1 + sum(num_nodes[:level]) for level in range(semantic_ids.num_levels))
            self.nodes = named(Embedding(1 + sum(num_nodes), config.width, rngs=rngs), "nodes", "width")
        self.positions = named(Embedding(max_len, config.width, rngs=rngs), "positions", "width")
        self.slots = named(Embedding(semantic_ids.num_levels, config.width, rngs=rngs), "levels", "width")
        self.blocks = nnx.List(
            [TransformerBlock(config.block_shape(), rngs=rngs) for _ in range(config.num_layers)]
        )
        self.final_norm = LayerNorm(config.width, config.full_width)

    def __call__(self, batch, key_B=None, query_positions=None, hidden=None):
        """Returns the outputs at whole items. Arguments: see SequenceModel."""
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
        """Returns outputs of the final norm; `log_probs` scales them."""
        return self.final_norm(x)

    def loss(self, batch, key_B, score):
        """See SequenceModel. The loss is the sum over targets of -log p(item); p is the product over the
        item's codes."""
        targets_BS = batch.targets
        next_BS = jnp.where(targets_BS > 0, targets_BS, _following(batch))
        x_BTD = self.run(self._embed(batch, next_BS), self.context(batch, key_B))
        x_BTD = self.read_out(x_BTD)
        x_BSQD = x_BTD.reshape(*targets_BS.shape, self.semantic_ids.num_levels, -1)
        paths_BSQ = jnp.asarray(self.semantic_ids.trie.paths_VQ)[targets_BS]
        is_target_BS = targets_BS > 0
        loss, node_BS = 0.0, jnp.zeros_like(targets_BS)
        for level in range(self.semantic_ids.num_levels):
            log_probs_BSM = self.log_probs(x_BSQD[:, :, level], node_BS, level)
            child_BS = paths_BSQ[..., level]
            index_BS = child_BS - jnp.asarray(self.semantic_ids.trie.first_child[level])[node_BS]
            log_prob_BS = jnp.take_along_axis(log_probs_BSM, index_BS[..., None], axis=-1)[..., 0]
            loss -= jnp.sum(jnp.where(is_target_BS, log_prob_BS, 0))
            node_BS = child_BS
        return loss, None, 0

    def log_probs(self, x, nodes, level: int):
        """Returns f32[..., M]: log-probabilities of the children of `nodes` [...], in order, then -inf.

        x: [..., D], the outputs of the tokens before. A child is scored by the vector of its code plus, with
        prefix_embeddings, that of its node. The softmax is over the children of a node, so the probabilities
        of all items sum to 1.
        """
        trie, first_child = self.semantic_ids.trie, jnp.asarray(self.semantic_ids.trie.first_child[level])
        children = first_child[nodes][..., None] + jnp.arange(trie.max_children[level])
        is_child = children < first_child[nodes + 1][..., None]
        children = jnp.where(is_child, children, 0)
        x = self.queries(x)

        def scores(vectors_XD):
            return jnp.matmul(x, vectors_XD.T.astype(x.dtype), preferred_element_type=jnp.float32)

        start = 1 + level * self.semantic_ids.codebook_size
        code_scores = scores(_entries(self.code_table, start, self.semantic_ids.codebook_size))
        logits = jnp.take_along_axis(code_scores, jnp.asarray(trie.codes[level])[children], axis=-1)
        if self.config.prefix_embeddings:
            start, num_nodes = self.first_nodes[level], len(trie.codes[level])
            vectors_XD = _entries(self.nodes, start, num_nodes)
            if num_nodes <= _PRODUCTS * trie.max_children[level]:
                logits += jnp.take_along_axis(scores(vectors_XD), children, axis=-1)
            else:
                vectors = vectors_XD[children].astype(x.dtype)
                logits += jnp.einsum("...d,...md->...m", x, vectors, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(jnp.where(is_child, logits, -jnp.inf), axis=-1)

    def prefill(self, batch, query_positions, room: int):
        num_levels = self.semantic_ids.num_levels
        query_positions = query_positions[0], query_positions[1] * num_levels
        x, cache = self.fill(self.inputs(batch), self.context(batch), query_positions, room * num_levels)
        return self.read_out(x), cache

    def step(self, events, cache):
        items_BK = events["item"]
        paths_BKQ = jnp.asarray(self.semantic_ids.trie.paths_VQ)[items_BK]
        codes_BKQ = jnp.asarray(self.semantic_ids.codes_VQ)[items_BK]
        for level in range(self.semantic_ids.num_levels - 1):
            cache = self.decode(codes_BKQ[..., level], paths_BKQ[..., level], level, cache)[1]
        return self._advance(jnp.sum(self._vectors(items_BK), axis=-2), cache)

    def decode(self, codes_NK, nodes_NK, level: int, cache):
        """Appends the code of the next item at `level` to each of K continuations. Returns (x_NKD, cache).

        nodes_NK: the trie nodes that the codes so far lead to, this one included."""
        x_NKD = self.code_table(1 + level * self.semantic_ids.codebook_size + codes_NK)
        if self.config.prefix_embeddings:
            x_NKD += self.nodes(self.first_nodes[level] + nodes_NK)
        return self._advance(x_NKD, cache)

    def _advance(self, x_NKD, cache):
        tokens_NK, num_levels = cache.positions(x_NKD.shape[1]), self.semantic_ids.num_levels
        x_NKD = self._add_positions(x_NKD, tokens_NK // num_levels, tokens_NK % num_levels)
        x_NKD, cache = self.advance(x_NKD, Context(tokens_NK), cache)
        return self.read_out(x_NKD), cache

    def _add_positions(self, x, positions, slots):
        """Returns token vectors as the first block reads them: scaled, with the vectors of the position of
        the item and of the token's slot in it (0 = whole item, then the codes)."""
        scale = (self.config.full_width or self.config.width) ** 0.5
        return x * scale + self.positions(positions) + self.slots(slots)

    def _vectors(self, items):
        """Returns the vectors of the codes of items, [..., Q, D]; with prefix_embeddings, plus those of their
        nodes."""

        def entry_ids(first_Q, numbers_VQ):
            entries_VQ = np.asarray(first_Q) + numbers_VQ
            entries_VQ[0] = 0
            return jnp.asarray(entries_VQ)[items]

        semantic_ids = self.semantic_ids
        first_codes = 1 + np.arange(semantic_ids.num_levels) * semantic_ids.codebook_size
        x = self.code_table(entry_ids(first_codes, semantic_ids.codes_VQ))
        if self.config.prefix_embeddings:
            x = x + self.nodes(entry_ids(self.first_nodes, semantic_ids.trie.paths_VQ))
        return x

    def _embed(self, batch, next_BS):
        """Returns x_BTD, T = S * Q tokens. next_BS: the next items, 0 if unknown."""
        whole_BSD = jnp.sum(self._vectors(batch.items), axis=2)
        codes_BSQD = self._vectors(next_BS)[:, :, :-1]
        x_BSQD = jnp.concatenate([whole_BSD[:, :, None], codes_BSQD], axis=2)
        slots_Q = jnp.arange(self.semantic_ids.num_levels)
        x_BSQD = self._add_positions(x_BSQD, batch.positions[..., None], slots_Q)
        return x_BSQD.reshape(x_BSQD.shape[0], -1, x_BSQD.shape[-1])


def _entries(table: Embedding, first: int, num: int):
    """Returns the vectors [num, D] of consecutive entries of a table, which may be quantized."""
    table_XD = table.embedding[...]
    if isinstance(table_XD, jax.Array):
        return table_XD[first : first + num]
    return table_XD.look_up(first + jnp.arange(num))


def _following(batch):
    """Returns the next item in the segment of each token; 0 at its end."""

    def shift(x_BS):
        return jnp.pad(x_BS[:, 1:], ((0, 0), (0, 1)))

    return jnp.where(shift(batch.segments) == batch.segments, shift(batch.items), 0)
