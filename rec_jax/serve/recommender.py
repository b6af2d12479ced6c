"""Recommendations: the best next items after a history, named by the item ids of the log.

recommender = rec_jax.load("runs/mine")
recommender.recommend(["i5", "i6"], k=10)
recommender.recommend(user="u7", k=10, trained_only=True)
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from rec_jax.data.queries import Queries, ranges
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.trained import TrainedModel, check_same_split

_SCORE_BYTES = 2**26  # limit for the scores of one batch of users
_MAX_BATCH, _MAX_BEAMS = 1024, 1024


@dataclass(frozen=True)
class Recommendation:
    item_id: str
    title: str  # "" if unknown
    score: float

    def __str__(self):
        return f"{self.item_id}  {self.title}".rstrip()


@dataclass(frozen=True)
class Recommendations(Sequence):
    """A list of recommendations, best first.

    history: (item id, title) of the events that the model read, oldest first. notes: remarks for the user,
    such as why the list is short.
    """

    items: tuple[Recommendation, ...]
    history: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def __str__(self):
        if not self.items:
            return "\n".join(("nothing to recommend", *(f"note: {note}" for note in self.notes)))
        lines = [f"the {len(self)} best next items:"]
        lines += [f"{rank:4d}  score {item.score:8.3f}  {item}" for rank, item in enumerate(self, 1)]
        return "\n".join((*lines, *(f"note: {note}" for note in self.notes)))

    __repr__ = __str__


@dataclass(frozen=True)
class Candidates:
    """The items that may be recommended. is_allowed_V: bool[V + 1]. reasons: why the others may not."""

    is_allowed_V: np.ndarray
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Recommender:
    """Recommends items with a trained model, or with the mean of several models of the same split.

    dims: score by the first `dims` dims of the vectors; 0 = all. mesh: None = the first device, the fastest
    for a single request.
    """

    def __init__(self, models: Sequence[TrainedModel], dims: int = 0, mesh=None):
        check_same_split(models)
        self.models, self._dims = list(models), dims
        self._mesh = mesh or make_mesh(MeshConfig(data=1))
        self.model = self.models[0]
        self._rankers = {}

    @classmethod
    def load(cls, *workdirs, dims: int = 0, mesh=None) -> "Recommender":
        """Loads the models that were trained in these directories."""
        return cls([TrainedModel.load(workdir) for workdir in workdirs], dims, mesh)

    def recommend(
        self,
        history: Sequence | None = None,
        k: int = 10,
        *,
        user=None,
        times: Sequence[int] | None = None,
        seen: bool = False,
        skip_unknown: bool = False,
        candidates: Candidates | None = None,
    ) -> Recommendations:
        """Returns the k best next items after a history. Give either `history` or `user`.

        Args:
          history: item ids, oldest first.
          user: the id of a user of the log, whose events are the history.
          times: seconds UTC of the events of `history`, for a model that reads times.
          seen: whether items of the history may be recommended again.
          skip_unknown: skip unknown ids in `history` instead of raising an error.
          candidates: result of the method `candidates`; None = all items.

        Raises ValueError for an unknown id, an empty history, and times that do not match the history.
        """
        if (history is None) == (user is None):
            raise ValueError("give either a history of item ids or a user")
        candidates, notes = candidates or self.candidates(), []
        if user is not None:
            queries, exclude = self._query_users(self.find_users([user]))
        else:
            queries = self._query_history(history, times, skip_unknown, notes)
            exclude = queries.seen()
        exclude = None if seen else exclude
        scores, ids, beams = self._top_k(queries, k, exclude, candidates)
        ids = ids[0][scores[0] > -np.inf]
        notes += candidates.notes
        notes += self._notes_on(ids, k, exclude, candidates, beams)
        named = zip(map(self._name, ids), scores[0], strict=False)
        events = queries.columns["item"][queries.starts[0] : queries.ends[0]]
        return Recommendations(
            tuple(Recommendation(*name, float(score)) for name, score in named),
            tuple(map(self._name, events)),
            tuple(notes),
        )

    def _query_history(self, item_ids: Sequence, times, skip_unknown: bool, notes: list) -> Queries:
        items, kept, unknown = self._find_items(item_ids, skip_unknown)
        if unknown:
            notes.append(f"{len(unknown)} unknown ids of the history were skipped: {_few(unknown)}")
        if not len(items):
            raise ValueError("the history is empty: give at least one item id of the training log")
        columns = {name for model in self.models for name in model.model.columns}
        if features := sorted(columns - {"time"}):
            notes.append(f"this model reads {', '.join(features)}; these count as missing in a given history")
        reads_times = "time" in columns
        if times is None:
            if reads_times:
                notes.append(
                    "this model reads times but none were given: all events count as simultaneous (set times)"
                )
            return Queries.one(items)
        times = np.asarray(times, np.int64)
        if len(times) != len(item_ids):
            raise ValueError(
                f"times has {len(times)} values for a history of {len(item_ids)} events: give one per event"
            )
        if np.any(np.diff(times) < 0):
            raise ValueError("times must not decrease: give the history and its times oldest first")
        if not reads_times:
            notes.append(
                f"times were ignored: a model of type {self.model.model_config.type!r} does not read them"
            )
        return Queries.one(items, times[kept])

    def candidates(
        self, allow: Iterable | None = None, deny: Iterable = (), trained_only: bool = False
    ) -> Candidates:
        """Returns the items that may be recommended.

        allow, deny: item ids to recommend from, and never to recommend; allow=None allows all. trained_only:
        without the items that have no training event, whose vectors were never trained.

        Raises ValueError if no item remains.
        """
        is_allowed_V = np.ones(self.model.num_items + 1, bool)
        is_allowed_V[0] = False
        reasons, notes = [], []

        def listed(name, ids) -> np.ndarray:
            items, _, unknown = self._find_items(ids, skip_unknown=True)
            if unknown:
                notes.append(f"{len(unknown):,} of {len(ids):,} ids to {name} are unknown: {_few(unknown)}")
            is_listed_V = np.zeros_like(is_allowed_V)
            is_listed_V[items] = True
            return is_listed_V

        if allow is not None:
            is_allowed_V &= listed("allow", list(allow))
            reasons.append(f"{is_allowed_V.sum():,} are allowed")
        if denied := list(deny):
            is_denied_V = listed("deny", denied)
            is_allowed_V &= ~is_denied_V
            reasons.append(f"{is_denied_V.sum():,} are denied")
        if trained_only:
            is_cold_V = self.model.train_counts == 0
            is_allowed_V &= ~is_cold_V
            reasons.append(f"{is_cold_V[1:].sum():,} have no training event")
        if not is_allowed_V.any():
            raise ValueError(f"no item is left to recommend: {', '.join((*reasons, *notes))}")
        return Candidates(is_allowed_V, tuple(reasons), tuple(notes))

    def find_users(self, user_ids: Sequence, skip_unknown: bool = False) -> np.ndarray:
        """Returns the numbers of users, int64[N], for their ids. Raises ValueError naming unknown ids."""
        index = self.model.users.ids.index
        users, _, unknown = _find(user_ids, index)
        if unknown and not skip_unknown:
            raise _unknown_error("user", unknown, index)
        return users

    def recommend_users(
        self, users: np.ndarray, k: int = 10, *, seen: bool = False, candidates: Candidates | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (users int64[B], items int32[B, k], scores f32[B, k]) for batches of many users. A score of
        -inf marks an unused slot of a list with fewer than k items."""
        candidates, num_items = candidates or self.candidates(), self.model.num_items
        size = int(np.clip(_SCORE_BYTES // (4 * (num_items + 1)), 1, _MAX_BATCH))
        for first in range(0, len(users), size):
            batch = users[first : first + size]
            queries, exclude = self._query_users(batch)
            exclude = None if seen else exclude
            scores_BK, ids_BK, _ = self._top_k(queries, min(k, num_items), exclude, candidates)
            yield batch, ids_BK, scores_BK

    def _query_users(self, users: np.ndarray) -> tuple[Queries, tuple]:
        """Returns (queries of the users' last events, (rows, items) of all items that they have seen)."""
        stored = self.model.users
        queries = Queries(stored.columns, stored.offsets[users], stored.offsets[users + 1], users)
        starts, ends = stored.seen_offsets[users], stored.seen_offsets[users + 1]
        rows, items = queries.seen()
        early_rows = np.repeat(np.arange(len(users)), ends - starts)
        early_items = stored.seen_items[ranges(starts, ends - starts)]
        return queries, (np.concatenate([rows, early_rows]), np.concatenate([items, early_items]))

    def _top_k(self, queries: Queries, k: int, exclude, candidates: Candidates):
        """Returns (scores f32[B, k], items int32[B, k], number of beams or 0), best first; the score of an
        unused slot is -inf."""
        beams = 0
        if self.model.model.is_generative:
            num_seen = 0 if exclude is None else int(np.bincount(exclude[0], minlength=1).max())
            beams = self._beams(k + num_seen + int((~candidates.is_allowed_V[1:]).sum()))
        if beams not in self._rankers:
            rankers = [model.ranker(self._mesh, self._dims, beams) for model in self.models]
            self._rankers[beams] = rankers[0] if len(rankers) == 1 else _ensemble(rankers)
        top = self._rankers[beams].top_k(queries, k, exclude, candidates.is_allowed_V)
        scores_BK, ids_BK = jax.device_get(top)
        if np.isnan(scores_BK).any():
            raise ValueError(
                f"NaN among the scores of {self.model.workdir}: the model is broken, train again"
            )
        return scores_BK, ids_BK, beams

    def _beams(self, needed: int) -> int:
        """Returns enough beams for a full list after seen and denied items are removed, up to a limit."""
        default = self.model.model_config.num_beams
        needed = min(1 << (needed - 1).bit_length(), max(_MAX_BEAMS, default))  # few shapes to compile
        return min(max(default, needed), self.model.num_items)

    def _find_items(self, item_ids: Sequence, skip_unknown: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Returns (item numbers int32[N] of the known ids, indices of these in `item_ids`, unknown ids)."""
        index = self.model.item_ids.index
        items, indices, unknown = _find(item_ids, index)
        if unknown and not skip_unknown:
            raise _unknown_error("item", unknown, index)
        return items.astype(np.int32), indices, unknown

    def _notes_on(self, ids, k: int, exclude, candidates: Candidates, beams: int) -> list[str]:
        """Remarks on a list: items without training, and why it is shorter than k."""
        notes, num_items = [], self.model.num_items
        cold = int((self.model.train_counts[ids] == 0).sum())
        if cold:
            notes.append(
                f"{cold} of the {len(ids)} items have no training event, so their scores are not trained "
                "(trained_only leaves such items out)"
            )
        if len(ids) == min(k, num_items):
            return notes
        left = candidates.is_allowed_V.copy()
        seen_items = [] if exclude is None else exclude[1]
        left[seen_items] = False
        if left.sum() > len(ids):
            return [*notes, f"the beam search with {beams:,} beams found only {len(ids)} items"]
        num_seen = len(seen_items)
        if num_seen == num_items:
            return [*notes, f"all {num_items:,} items are in the history (seen=True recommends them again)"]
        seen = [f"{num_seen:,} are in the history (seen=True recommends them again)"] if num_seen else []
        reasons = ", ".join((*candidates.reasons, *seen))
        return [*notes, f"no other items are left of {num_items:,}: {reasons}"]

    def _name(self, item: int) -> tuple[str, str]:
        return self.model.item_ids[item], self.model.titles[item]


def _ensemble(rankers):
    from rec_jax.eval.ensemble import EnsembleRanker

    return EnsembleRanker(rankers)


def _find(ids: Sequence, index: dict[str, int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns (numbers of the known ids, indices of these in `ids`, unknown ids)."""
    ids = [str(text).strip() for text in ids]
    is_known = [text != "" and text in index for text in ids]
    numbers = np.array([index[text] for text, known in zip(ids, is_known, strict=True) if known], np.int64)
    unknown = [text for text, known in zip(ids, is_known, strict=True) if not known]
    return numbers, np.flatnonzero(is_known), unknown


def _unknown_error(kind: str, unknown: list[str], index: dict[str, int]) -> ValueError:
    near = difflib.get_close_matches(unknown[0], list(index)[:100_000], n=3)
    hint = f"; similar to {unknown[0]!r}: {', '.join(near)}" if near else ""
    skip = "; skip_unknown leaves unknown ids out" if kind == "item" else ""
    return ValueError(f"unknown {kind} ids, in no event of the training log: {_few(unknown)}{hint}{skip}")


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + rest
