"""The best next items of a person, under the ids of the log."""

import difflib
from dataclasses import dataclass

import numpy as np

from rec_jax.data.histories import Histories
from rec_jax.data.queries import Queries
from rec_jax.models.ranker import Ranker


@dataclass(frozen=True)
class Recommendation:
    item_id: str
    title: str  # "" where none is known
    score: float

    def __str__(self):
        return f"{self.item_id}  {self.title}".rstrip()


def events_of(histories: Histories, user_id: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(items, times) of all of a user's events, oldest first; times None where the log has none.

    Raises ValueError naming an id that is not in the log.
    """
    user = _find([user_id], histories.user_ids, "user")[0]
    events = slice(*histories.offsets[user : user + 2])
    return histories.items[events], None if histories.times is None else histories.times[events]


def items_of(histories: Histories, item_ids: list[str]) -> np.ndarray:
    """Rows of the catalogue. Raises ValueError naming every id that is not in the log."""
    return _find(item_ids, histories.item_ids, "item")


def recommend(ranker: Ranker, histories: Histories, items, times=None, *, k: int = 10, seen: bool = False):
    """The k best next items after those of a history, best first, as Recommendations.

    items: int[N], oldest first; times: their seconds, for a model that reads them. seen: may items of the
    history come again?
    """
    queries = Queries.one(items, times)
    scores, ids = ranker.top_k(queries, k, None if seen else queries.seen())
    best = zip(np.asarray(scores)[0], np.asarray(ids)[0], strict=True)
    return [Recommendation(*name(histories, item), float(score)) for score, item in best if item]


def name(histories: Histories, item: int) -> tuple[str, str]:
    """The item's id and title, "" where it has none."""
    item_id = str(histories.item_ids[item])
    return item_id, histories.titles[item_id] if item_id in histories.titles else ""


def _find(wanted: list[str], known: np.ndarray, kind: str) -> np.ndarray:
    rows = {str(known_id): row for row, known_id in enumerate(known)}
    wanted = [str(wanted_id).strip() for wanted_id in wanted]
    unknown = [wanted_id for wanted_id in wanted if not wanted_id or wanted_id not in rows]
    if unknown:
        near = difflib.get_close_matches(unknown[0], rows, n=3)
        hint = f"; near {unknown[0]!r}: {', '.join(near)}" if near else ""
        raise ValueError(f"unknown {kind} ids, in no event of the training log: {unknown}{hint}")
    return np.array([rows[wanted_id] for wanted_id in wanted])
