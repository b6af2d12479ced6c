"""Rules that remove events from a log. Each is off by default, and the report counts what it removes."""

import dataclasses

import numpy as np

from rec_jax.data.interactions import InteractionLog, compact
from rec_jax.data.textfile import count

REPORT_HEAD = ("rule", "users", "items", "events", "removed")


def clean(
    log: InteractionLog,
    *,
    min_rating: float = 0.0,
    duplicates: str = "keep",
    min_item_events: int = 1,
    min_user_events: int = 1,
    k_core: int = 0,
) -> tuple[InteractionLog, list[tuple]]:
    """Applies the rules in the order of the arguments. Returns (log, report): one REPORT_HEAD tuple per rule.

    Users and items that lose all their events leave the vocabulary; the others keep their order.

    Args:
      min_rating: events with a lower rating, or without one, are removed. 0: off.
      duplicates: which events of the same user with the same item are kept: "keep" keeps all of them,
        "first" and "last" keep the first or the last in time.
      min_item_events, min_user_events: items, then users, with fewer events are removed. Each rule is
        applied once, so the second may leave items with fewer than min_item_events.
      k_core: users and items with fewer events are removed, repeatedly, until none is left. 0: off.

    Raises ValueError if a rule is unknown, needs a column that the log does not have, or removes all events.
    """
    if duplicates not in ("keep", "first", "last"):
        raise ValueError(f"duplicates={duplicates!r} is not one of keep, first, last")
    keep = np.ones(log.num_events, bool)
    rows = [_row("as read", log, keep, 0)]

    def apply(rule: str, kept: np.ndarray):
        nonlocal keep
        removed = int(keep.sum() - kept.sum())
        keep = kept
        rows.append(_row(rule, log, keep, removed))
        if not keep.any():
            raise ValueError(f"{rule} removes all {log.num_events:,} events: choose a weaker rule")

    if min_rating:
        if log.ratings is None:
            raise ValueError(
                f"min_rating={min_rating} needs ratings, but the log has none: set rating to its column"
            )
        apply(f"min_rating={min_rating:g}", keep & (log.ratings >= min_rating))
    repeated = _repeated(log, keep, last=duplicates == "last")
    if duplicates == "keep":
        rows.append((f"duplicates=keep ({count(int(repeated.sum()), 'repeat')})", *rows[-1][1:4], 0))
    else:
        apply(f"duplicates={duplicates}", keep & ~repeated)
    if min_item_events > 1:
        apply(f"min_item_events={min_item_events}", keep & _frequent(log.items, keep, min_item_events))
    if min_user_events > 1:
        apply(f"min_user_events={min_user_events}", keep & _frequent(log.users, keep, min_user_events))
    if k_core > 1:
        core, before = keep, None
        while before is None or core.sum() < before:
            before = core.sum()
            core = core & _frequent(log.users, core, k_core)
            core = core & _frequent(log.items, core, k_core)
        apply(f"k_core={k_core}", core)
    return (log if keep.all() else _select(log, keep)), rows


def _row(rule: str, log: InteractionLog, keep: np.ndarray, removed: int):
    users, items = (np.count_nonzero(np.bincount(x[keep])) for x in (log.users, log.items))
    return rule, int(users), int(items), int(keep.sum()), removed


def _frequent(codes: np.ndarray, keep: np.ndarray, least: int) -> np.ndarray:
    """bool[N]: whether the event's user or item (its code) has at least `least` events among those kept."""
    return np.bincount(codes[keep], minlength=int(codes.max()) + 1)[codes] >= least


def _repeated(log: InteractionLog, keep: np.ndarray, last: bool) -> np.ndarray:
    """bool[N]: whether a kept event has an earlier one (a later one if `last`) of the same user and item."""
    events = np.flatnonzero(keep)
    if log.times is not None:
        events = events[np.argsort(log.times[events], kind="stable")]
    if last:
        events = events[::-1]
    pairs = log.users[events].astype(np.int64) * len(log.item_ids) + log.items[events]
    by_pair = np.argsort(pairs, kind="stable")
    is_repeat = np.zeros(len(events), bool)
    is_repeat[by_pair[1:]] = pairs[by_pair[1:]] == pairs[by_pair[:-1]]
    repeated = np.zeros(log.num_events, bool)
    repeated[events[is_repeat]] = True
    return repeated


def _select(log: InteractionLog, keep: np.ndarray) -> InteractionLog:
    users, user_ids = compact(log.users[keep], log.user_ids, 0)
    items, item_ids = compact(log.items[keep], log.item_ids, 1)
    return dataclasses.replace(
        log,
        users=users,
        items=items,
        times=None if log.times is None else log.times[keep],
        ratings=None if log.ratings is None else log.ratings[keep],
        user_ids=user_ids,
        item_ids=item_ids,
        features={name: column[keep] for name, column in log.features.items()},
    )
