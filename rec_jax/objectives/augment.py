"""Other views of packed histories: cropped, masked, reordered, or with similar items in place of some."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rec_jax.data.batch import Batch, select
from rec_jax.hashing import Site, words


@dataclass(frozen=True)
class AugmentConfig:
    """Each history gets one of the changes whose number is above 0, drawn anew in every step.

    Targets stay but for those that the change gives away: of tokens cropped off, and of reordered ones whose
    next item may stand before them.
    """

    crop: float = 0.0  # the share that is kept, anywhere in the history
    mask: float = 0.0  # the share of items that become item 0, whose vector then learns to stand for any
    reorder: float = 0.0  # the share that is shuffled, neighbours anywhere in the history
    substitute: float = 0.0  # the share of items that become one of their neighbours in training
    num_neighbours: int = 5  # of each item

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
    """The batch with each segment changed; no segment sees anything of another.

    key_B: uint32[B] from `hashing.row_keys`. neighbours_VK: int32[V + 1, K] of each item, nearest first (0 =
    none), for substitute. Padding is left where tokens were cropped off; a masked event loses its item and
    all that gives it away; reordered events move with all of their columns.

    Source: CL4SRec, Xie et al., ICDE'22 (arXiv 2010.14395), section 3.2.3; substitute: CoSeRec, Liu et al.
    2021 (arXiv 2108.06479), section 3.2.1.
    Differs: masked and substituted items are drawn each by itself, so their share holds on average;
    neighbours are of the cosine between items as sets of users, and one of the nearest is drawn.
    """
    changes = []
    if config.crop:
        changes.append(_crop(config.crop, batch, key_B))
    if config.mask:
        hidden_BS = _coins(config.mask, batch, key_B, Site.HIDE)
        changes.append(batch.hide(hidden_BS))
    if config.reorder:
        changes.append(_reorder(config.reorder, batch, key_B))
    if config.substitute:
        changes.append(_substitute(config.substitute, config.num_neighbours, batch, key_B, neighbours_VK))
    choice_BS = _per_segment(batch, key_B, Site.AUGMENT) % len(changes)
    return select(choice_BS, changes)


def segment_lengths(batch: Batch) -> jax.Array:
    """int32[B, S]: tokens of the segment that each token is in; of padding, anything."""
    return batch.positions + 1 + _to_the_end(batch)


def _to_the_end(batch):
    """Tokens of the same segment after each one."""
    segments_BS = batch.segments
    length = segments_BS.shape[1]
    is_last_BS = segments_BS != jnp.pad(segments_BS[:, 1:], ((0, 0), (0, 1)))
    column_S = jnp.arange(length)
    last_BS = jax.lax.cummin(jnp.where(is_last_BS, column_S, length - 1), axis=1, reverse=True)
    return last_BS - column_S


def _per_segment(batch, key_B, site: Site):
    """uint32[B, S], the same for all tokens of a segment: what is drawn for its first."""
    draws_BS = words(key_B, site, batch.segments.shape[1:])
    first_BS = jnp.arange(draws_BS.shape[1]) - batch.positions
    return jnp.take_along_axis(draws_BS, first_BS, axis=1)


def _coins(share: float, batch, key_B, site: Site):
    draws_BS = words(key_B, site, batch.segments.shape[1:])
    return (draws_BS >> 8).astype(jnp.float32) * 2.0**-24 < share


def _span(share: float, batch, key_B, site: Site):
    """A stretch of floor(share * length) tokens, at least 1, anywhere in each segment: (first position,
    number)."""
    length_BS = segment_lengths(batch)
    number_BS = jnp.maximum(1, (share * length_BS).astype(jnp.int32))
    room_BS = (length_BS - number_BS + 1).astype(jnp.uint32)
    return (_per_segment(batch, key_B, site) % room_BS).astype(jnp.int32), number_BS


def _crop(share: float, batch, key_B):
    first_BS, number_BS = _span(share, batch, key_B, Site.CROP)
    positions_BS = batch.positions - first_BS
    is_kept_BS = (positions_BS >= 0) & (positions_BS < number_BS)
    return batch.replace(positions=positions_BS).keep(is_kept_BS)


def _reorder(share: float, batch, key_B):
    first_BS, number_BS = _span(share, batch, key_B, Site.REORDER_SPAN)
    inside_BS = batch.positions - first_BS
    is_shuffled_BS = (inside_BS >= 0) & (inside_BS < number_BS)
    column_S = jnp.arange(batch.segments.shape[1])
    # Sorted by place, those of a stretch all by its first place and then at random.
    place_BS = jnp.where(is_shuffled_BS, column_S - inside_BS, column_S)
    random_BS = words(key_B, Site.REORDER, batch.segments.shape[1:])
    names = list(batch.events)
    columns = (place_BS, random_BS, *(batch.events[name] for name in names))
    moved = jax.lax.sort(columns, dimension=1, num_keys=2)[2:]
    is_given_away_BS = is_shuffled_BS & (inside_BS < number_BS - 1)
    targets_BS = jnp.where(is_given_away_BS, 0, batch.targets)
    return batch.replace(events=dict(zip(names, moved, strict=True))).with_targets(targets_BS)


def _substitute(share: float, num: int, batch, key_B, neighbours_VK):
    items_BS = batch.items
    draws_BS = words(key_B, Site.NEIGHBOUR, items_BS.shape[1:]) % min(num, neighbours_VK.shape[1])
    others_BS = neighbours_VK[items_BS, draws_BS]
    is_other_BS = _coins(share, batch, key_B, Site.SUBSTITUTE) & (others_BS > 0)
    return batch.with_items(jnp.where(is_other_BS, others_BS, items_BS))
