"""User histories that a trained model keeps, so that it can recommend to the users of its log."""

from dataclasses import dataclass

import numpy as np

from rec_jax.data.strings import Strings


@dataclass(frozen=True)
class UserHistories:
    """The last events of each user of the log: items[offsets[u]:offsets[u + 1]], oldest first.

    ids: Strings[U]. items: int32[N]. times: int64[N] seconds UTC, or None. features: other columns of the
    same events, [N] each, as in `Histories`. seen_items[seen_offsets[u]:seen_offsets[u + 1]]: the items that
    occur only in the user's earlier events.
    """

    ids: Strings
    offsets: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    features: dict
    seen_offsets: np.ndarray
    seen_items: np.ndarray

    @property
    def columns(self) -> dict[str, np.ndarray]:
        times = {} if self.times is None else {"time": self.times}
        return {"item": self.items} | times | self.features


def last_events(histories, max_len: int) -> UserHistories:
    """Keeps the last max_len events of each user, and the items of earlier events, which are not recommended
    again."""
    offsets, lengths = np.asarray(histories.offsets), np.diff(histories.offsets)
    kept = np.minimum(lengths, max_len)
    is_kept = np.arange(histories.num_events) >= np.repeat(offsets[1:] - kept, lengths)
    num_ids = histories.num_items + 1
    keys = np.repeat(np.arange(histories.num_users), lengths) * num_ids + histories.items
    users, items = np.divmod(np.setdiff1d(keys[~is_kept], keys[is_kept]), num_ids)
    num_seen = np.bincount(users, minlength=histories.num_users)
    return UserHistories(
        ids=Strings.of(histories.user_ids),
        offsets=np.concatenate([[0], np.cumsum(kept)]),
        items=np.asarray(histories.items)[is_kept],
        times=None if histories.times is None else np.asarray(histories.times)[is_kept],
        features={name: np.asarray(column)[is_kept] for name, column in histories.features.items()},
        seen_offsets=np.concatenate([[0], np.cumsum(num_seen)]),
        seen_items=items.astype(np.int32),
    )
