"""Augmented views of packed histories: cropped, masked, reordered, or with some items substituted."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rec_jax.data.batch import Batch, select
from rec_jax.hashing import Site, words


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentations. Every step applies to each history one of those that are above 0, chosen at random.

    Tokens keep their targets, except for cropped tokens, and for reordered tokens whose next item may now
    come before them.
    """

    crop: float = 0.0  # share of the history that is kept: one contiguous span
    mask: float = 0.0  # share of items replaced by item 0, whose vector is trained as the mask vector
    reorder: float = 0.0  # share of the history that is shuffled: one contiguous span
    substitute: float = 0.0  # share of items replaced by one of their nearest neighbours in the training data
    num_neighbours: int = 5  # neighbours of an item to choose from

    def __post_init__(self):
        for name in ("crop", "mask", "reorder", "substitute"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1], 0 = off (AugmentConfig)")
        if self.num_neighbours < 1:
            raise ValueError(f"num_neighbours={self.num_neighbours} must be at least 1 (AugmentConfig)")

    @property
    def is_on(self) -> bool:
        return any((self.crop, self.mask, self.reorder, self.substitute))


def augment(config: AugmentConfig, batch: Batch, key_B, neighbours_VK=None) -> Batch:
    """Returns the batch with every segment augmented, independently of the other segments.

    key_B: uint32[B] from `hashing.row_keys`. neighbours_VK: int32[V + 1, K], the neighbours of each item,
    nearest first (0 = none); needed for substitute. Cropped tokens become padding. A masked event loses its
    item and every column that reveals the item. Reordered events move with all of their columns.

    Source: CL4SRec, Xie et al., ICDE'22 (arXiv 2010.14395), section 3.2.3; substitute: CoSeRec, Liu et al.
    2021 (arXiv 2108.06479), section 3.2.1.
    Differs: each item is masked or substituted independently, so the share holds on average; the similarity
    is the cosine between the sets of users of two items, and the substitute is drawn from the nearest ones.
    """
    changes = []
    if config.crop:
        changes.append(_crop(config.crop, batch, key_B))
    if config.mask:
        is_masked_BS = _draw_with_probability(config.mask, batch, key_B, Site.HIDE)
        changes.append(batch.hide(is_masked_BS))
    if config.reorder:
        changes.append(_reorder(config.reorder, batch, key_B))
    if config.substitute:
        changes.append(_substitute(config.substitute, config.num_neighbours, batch, key_B, neighbours_VK))
    choice_BS = _draw_per_segment(batch, key_B, Site.AUGMENT) % len(changes)
    return select(choice_BS, changes)


def segment_lengths(batch: Batch) -> jax.Array:
    """int32[B, S]: the length of each token's segment; undefined for padding."""
    return batch.positions + 1 + _tokens_after(batch)


def _tokens_after(batch):
    """int32[B, S]: the number of tokens after each token in its segment."""
    segments_BS = batch.segments
    length = segments_BS.shape[1]
    is_last_BS = segments_BS != jnp.pad(segments_BS[:, 1:], ((0, 0), (0, 1)))
    column_S = jnp.arange(length)
    last_BS = jax.lax.cummin(jnp.where(is_last_BS, column_S, length - 1), axis=1, reverse=True)
    return last_BS - column_S


def _draw_per_segment(batch, key_B, site: Site):
    """uint32[B, S]: random words, the same for all tokens of a segment: the word of its first token."""
    draws_BS = words(key_B, site, batch.segments.shape[1:])
    first_BS = jnp.arange(draws_BS.shape[1]) - batch.positions
    return jnp.take_along_axis(draws_BS, first_BS, axis=1)


def _draw_with_probability(share: float, batch, key_B, site: Site):
    """bool[B, S]: independently true with probability `share`."""
    draws_BS = words(key_B, site, batch.segments.shape[1:])
    return (draws_BS >> 8).astype(jnp.float32) * 2.0**-24 < share


def _span(share: float, batch, key_B, site: Site):
    """Draws a span of max(1, floor(share * length)) tokens in each segment: (first position, size)."""
    length_BS = segment_lengths(batch)
    size_BS = jnp.maximum(1, (share * length_BS).astype(jnp.int32))
    num_starts_BS = (length_BS - size_BS + 1).astype(jnp.uint32)
    return (_draw_per_segment(batch, key_B, site) % num_starts_BS).astype(jnp.int32), size_BS


def _crop(share: float, batch, key_B):
    first_BS, size_BS = _span(share, batch, key_B, Site.CROP)
    positions_BS = batch.positions - first_BS
    is_kept_BS = (positions_BS >= 0) & (positions_BS < size_BS)
    return batch.replace(positions=positions_BS).keep(is_kept_BS)


def _reorder(share: float, batch, key_B):
    first_BS, size_BS = _span(share, batch, key_B, Site.REORDER_SPAN)
    offset_BS = batch.positions - first_BS
    is_shuffled_BS = (offset_BS >= 0) & (offset_BS < size_BS)
    column_S = jnp.arange(batch.segments.shape[1])
    # Sort by column. The tokens of a span share the column of its first token, so that the second, random
    # key shuffles them.
    sort_key_BS = jnp.where(is_shuffled_BS, column_S - offset_BS, column_S)
    random_BS = words(key_B, Site.REORDER, batch.segments.shape[1:])
    names = list(batch.events)
    columns = (sort_key_BS, random_BS, *(batch.events[name] for name in names))
    moved = jax.lax.sort(columns, dimension=1, num_keys=2)[2:]
    # The next item of every token of the span except the last may now come before the token.
    is_revealed_BS = is_shuffled_BS & (offset_BS < size_BS - 1)
    targets_BS = jnp.where(is_revealed_BS, 0, batch.targets)
    return batch.replace(events=dict(zip(names, moved, strict=True))).with_targets(targets_BS)


def _substitute(share: float, num: int, batch, key_B, neighbours_VK):
    items_BS = batch.items
    draws_BS = words(key_B, Site.NEIGHBOUR, items_BS.shape[1:]) % min(num, neighbours_VK.shape[1])
    substitutes_BS = neighbours_VK[items_BS, draws_BS]
    is_replaced_BS = _draw_with_probability(share, batch, key_B, Site.SUBSTITUTE) & (substitutes_BS > 0)
    return batch.with_items(jnp.where(is_replaced_BS, substitutes_BS, items_BS))
