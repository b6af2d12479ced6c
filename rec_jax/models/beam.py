"""Beam search over the semantic ids of a catalogue, and a ranker that uses it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.data.batch import Batch
from rec_jax.data.queries import Queries
from rec_jax.mesh import place_whole_batch, replicate
from rec_jax.models.base import Model
from rec_jax.models.ranker import ScoreRanker
from rec_jax.objectives.catalogue import Scores

_HISTORIES = 32  # histories in one search, over all devices


def beam_search(module, batch, query_positions, num_beams: int) -> tuple[jax.Array, jax.Array]:
    """Returns (items int32[N, K], log-probabilities f32[N, K]): the most likely next items of N histories,
    best first.

    Only paths of the trie are searched, so every result is an item, and no item is listed twice. K is
    num_beams, or the number of items if that is smaller. A history is encoded once, whatever K is.

    batch: packed rows, as for the model. query_positions: (rows int[N], columns int[N]) of the last event of
    each history.
    """
    semantic_ids, trie = module.semantic_ids, module.semantic_ids.trie
    x_ND, cache = module.prefill(batch, query_positions, room=1)
    x_NKD = x_ND[:, None]
    node_NK = jnp.zeros((len(x_ND), 1), jnp.int32)  # the root
    log_prob_NK = jnp.zeros((len(x_ND), 1))
    for level in range(semantic_ids.num_levels):
        first, code_of = jnp.asarray(trie.first_child[level]), jnp.asarray(trie.codes[level])
        log_prob_NKM = log_prob_NK[..., None] + module.log_probs(x_NKD, node_NK, level)
        width = min(num_beams, len(code_of))
        log_prob_NK, best_NK = jax.lax.top_k(log_prob_NKM.reshape(len(x_ND), -1), width)
        parent_NK, child_NK = best_NK // trie.max_children[level], best_NK % trie.max_children[level]
        node_NK = first[jnp.take_along_axis(node_NK, parent_NK, axis=1)] + child_NK
        if level < semantic_ids.num_levels - 1:
            x_NKD, cache = module.decode(code_of[node_NK], node_NK, level, cache.fork(parent_NK))
    return jnp.asarray(trie.items)[node_NK], log_prob_NK


@partial(jax.jit, static_argnums=(0, 4))
def generate(model: Model, params, batch, last_N, num_beams: int):
    """`beam_search`, compiled, for one history per row. last_N: int[N], the column of its last event."""
    return beam_search(model.bind(params), batch, (jnp.arange(len(last_N)), last_N), num_beams)


@partial(jax.jit, static_argnums=(0, 4, 5))
def _generate_on(model: Model, params, batch, last_N, num_beams: int, mesh: Mesh):
    def part(params, batch, last_N):
        return generate(model, params, batch, last_N, num_beams)

    specs = (P(), P("data"), P("data"))
    search = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
    return jax.lax.with_sharding_constraint(search(params, batch, last_N), NamedSharding(mesh, P()))


class BeamRanker(ScoreRanker):
    """Ranks with a generative retrieval model. The items that a beam search finds are scored by their
    log-probabilities. All others are tied at -inf; an evaluator takes the expected metric over random
    orderings.

    Items of the history take up beams, too: set num_beams to at least the length of the longest list plus
    that of a usual history.
    """

    def __init__(self, model: Model, params, num_items: int, max_len: int, mesh: Mesh, num_beams: int):
        self._model, self._num_items, self._max_len, self._mesh = model, num_items, max_len, mesh
        self._params, self._num_beams = replicate(params, mesh), num_beams
        num_devices = mesh.shape["data"]
        self._rows = -(-_HISTORIES // num_devices) * num_devices

    def scores(self, queries: Queries) -> Scores:
        """Searches in blocks of histories of similar length, padded to few lengths: each is compiled once."""
        items = queries.columns["item"]
        lengths = np.minimum(queries.lengths, self._max_len)
        scores_BV = np.full((len(queries), self._num_items + 1), -np.inf, np.float32)
        by_length = np.argsort(lengths, kind="stable")
        for first in range(0, len(queries), self._rows):
            block = by_length[first : first + self._rows]
            longest = min(self._max_len, max(8, 1 << int(lengths[block].max() - 1).bit_length()))
            event_NS = queries.ends[block, None] - lengths[block, None] + np.arange(longest)
            is_real_NS = np.arange(longest) < lengths[block, None]
            items_NS = items[np.where(is_real_NS, event_NS, 0)]
            batch = Batch(
                events={"item": np.where(is_real_NS, items_NS, 0).astype(np.int32)},
                segments=is_real_NS.astype(np.int32),
                positions=np.where(is_real_NS, np.arange(longest), 0).astype(np.int32),
            )
            last_N, missing = np.asarray(lengths[block] - 1, np.int32), self._rows - len(block)
            widths = (0, missing), (0, 0)
            padded = jax.tree.map(lambda x: np.pad(x, widths[: x.ndim]), (batch, last_N))  # noqa: B023
            batch, last_N = place_whole_batch(padded, self._mesh)
            best = _generate_on(self._model, self._params, batch, last_N, self._num_beams, self._mesh)
            items_NK, log_prob_NK = (np.asarray(x)[: len(block)] for x in best)
            scores_BV[block[:, None], items_NK] = log_prob_NK
        return Scores(scores_BV)
