"""Beam search over the semantic ids of a catalogue, and a ranker by what it finds."""

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

_HISTORIES = 32  # searched for at once, over all devices


def beam_search(module, batch, query_positions, num_beams: int) -> tuple[jax.Array, jax.Array]:
    """The likeliest next items of N histories, best first: (items int32[N, K], log-probabilities f32[N, K]).

    Every path is one of an item, and every item comes once; K is num_beams, or the catalogue if that is
    smaller: as every path leads to an item, K beams never run dry. A history is read once, whatever K.

    batch: packed rows as for the model; at: (rows int[N], columns int[N]) of the last event of each history.
    """
    semantic_ids, trie = module.semantic_ids, module.semantic_ids.trie
    x_ND, cache = module.prefill(batch, query_positions, room=1)
    x_NKD = x_ND[:, None]
    node_NK = jnp.zeros((len(x_ND), 1), jnp.int32)  # the root
    log_prob_NK = jnp.zeros((len(x_ND), 1))
    for level in range(semantic_ids.num_levels):
        first, code_of = jnp.asarray(trie.first[level]), jnp.asarray(trie.codes[level])
        log_prob_NKM = log_prob_NK[..., None] + module.log_probs(x_NKD, node_NK, level)
        width = min(num_beams, len(code_of))
        log_prob_NK, best_NK = jax.lax.top_k(log_prob_NKM.reshape(len(x_ND), -1), width)
        parent_NK, place_NK = best_NK // trie.most[level], best_NK % trie.most[level]
        node_NK = first[jnp.take_along_axis(node_NK, parent_NK, axis=1)] + place_NK
        if level < semantic_ids.num_levels - 1:
            x_NKD, cache = module.decode(code_of[node_NK], node_NK, level, cache.fork(parent_NK))
    return jnp.asarray(trie.items)[node_NK], log_prob_NK


@partial(jax.jit, static_argnums=(0, 4))
def generate(model: Model, params, batch, last_N, num_beams: int):
    """`beam_search`, compiled, for one history a row; last_N: int[N], the column of its last event."""
    return beam_search(model.bind(params), batch, (jnp.arange(len(last_N)), last_N), num_beams)


@partial(jax.jit, static_argnums=(0, 4, 5))
def _generate_on(model: Model, params, batch, last_N, num_beams: int, mesh: Mesh):
    def part(params, batch, last_N):
        return generate(model, params, batch, last_N, num_beams)

    specs = (P(), P("data"), P("data"))
    found = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
    return jax.lax.with_sharding_constraint(found(params, batch, last_N), NamedSharding(mesh, P()))


class BeamRanker(ScoreRanker):
    """Ranks by a generative retrieval model: log-probabilities of the items that a beam search finds, -inf
    for all others, which are tied: an evaluator takes their expected metric over random orderings.

    Seen items take beams like others: give as many beams as the longest list and a usual history together.
    """

    def __init__(self, model: Model, params, num_items: int, max_len: int, mesh: Mesh, num_beams: int):
        self._model, self._num_items, self._max_len, self._mesh = model, num_items, max_len, mesh
        self._params, self._num_beams = replicate(params, mesh), num_beams
        num_devices = mesh.shape["data"]
        self._rows = -(-_HISTORIES // num_devices) * num_devices

    def scores(self, queries: Queries) -> Scores:
        """Searches for blocks of histories of about a length, each length of block compiled once."""
        items = queries.columns["item"]
        lengths = np.minimum(queries.lengths, self._max_len)
        scores_BV = np.full((len(queries), self._num_items + 1), -np.inf, np.float32)
        by_length = np.argsort(lengths, kind="stable")
        for first in range(0, len(queries), self._rows):
            block = by_length[first : first + self._rows]
            longest = min(self._max_len, max(8, 1 << int(lengths[block].max() - 1).bit_length()))
            places_NS = queries.ends[block, None] - lengths[block, None] + np.arange(longest)
            real_NS = np.arange(longest) < lengths[block, None]
            items_NS = items[np.where(real_NS, places_NS, 0)]
            batch = Batch(
                events={"item": np.where(real_NS, items_NS, 0).astype(np.int32)},
                segments=real_NS.astype(np.int32),
                positions=np.where(real_NS, np.arange(longest), 0).astype(np.int32),
            )
            last_N, missing = np.asarray(lengths[block] - 1, np.int32), self._rows - len(block)
            widths = (0, missing), (0, 0)
            padded = jax.tree.map(lambda x: np.pad(x, widths[: x.ndim]), (batch, last_N))  # noqa: B023
            batch, last_N = place_whole_batch(padded, self._mesh)
            found = _generate_on(self._model, self._params, batch, last_N, self._num_beams, self._mesh)
            items_NK, log_prob_NK = (np.asarray(x)[: len(block)] for x in found)
            scores_BV[block[:, None], items_NK] = log_prob_NK
        return Scores(scores_BV)
