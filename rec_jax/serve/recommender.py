"""The best next items after a history, under the ids of the log.

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

_SCORE_BYTES = 2**26  # of the scores of one batch of users
_MAX_BATCH, _MAX_BEAMS = 1024, 1024


@dataclass(frozen=True)
class Recommendation:
    item_id: str
    title: str  # "" where none is known
    score: float

    def __str__(self):
        return f"{self.item_id}  {self.title}".rstrip()


@dataclass(frozen=True)
class Recommendations(Sequence):
    """A list, best first. history: (id, title) of the events that it continues, oldest first. notes: what to
    know about it, a sentence each."""

    items: tuple[Recommendation, ...]
    history: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def __str__(self):
        if not self.items:
            return "\n".join(("nothing to recommend", *self.notes))
        lines = [f"the {len(self)} best next items:"]
        lines += [f"{rank:4d}  score {item.score:8.3f}  {item}" for rank, item in enumerate(self, 1)]
        return "\n".join((*lines, *(f"note: {note}" for note in self.notes)))

    __repr__ = __str__


@dataclass(frozen=True)
class Candidates:
    """Which items may be recommended. is_allowed_V: bool[V + 1]. reasons: why the others may not."""

    is_allowed_V: np.ndarray
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Recommender:
    """Recommends by a trained model, or by the mean of several of one split.

    dims: score by so many first dims; 0 = by all. mesh: None = the first device, which answers soonest.
    """

    def __init__(self, models: Sequence[TrainedModel], dims: int = 0, mesh=None):
        check_same_split(models)
        self.models, self._dims = list(models), dims
        self._mesh = mesh or make_mesh(MeshConfig(data=1))
        self.model = self.models[0]
        self._rankers = {}

    @classmethod
    def load(cls, *workdirs, dims: int = 0, mesh=None) -> "Recommender":
        """Of the runs that were trained in these directories."""
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
        """The k best next items.

        Args:
          history: item ids, oldest first; or
          user: the id of a user of the log, whose events are the history.
          times: seconds UTC of the events of `history`, for a model that reads times.
          seen: may items of the history come again?
          skip_unknown: leave out ids of `history` that the model does not know, instead of an error.
          candidates: from `candidates`; None = all items.

        Raises ValueError for an unknown id, an empty history, times that do not fit.
        """
        if (history is None) == (user is None):
            raise ValueError("give either a history of item ids or a user")
        candidates, notes = candidates or self.candidates(), []
        if user is not None:
            queries, exclude = self._of_users(self.find_users([user]))
        else:
            queries = self._of_history(history, times, skip_unknown, notes)
            exclude = queries.seen()
        exclude = None if seen else exclude
        scores, ids, beams = self._top_k(queries, k, exclude, candidates)
        ids = ids[0][scores[0] > -np.inf]
        notes += candidates.notes
        notes += self._notes_on(ids, k, exclude, candidates, beams)
        found = zip(map(self._name, ids), scores[0], strict=False)
        events = queries.columns["item"][queries.starts[0] : queries.ends[0]]
        return Recommendations(
            tuple(Recommendation(*name, float(score)) for name, score in found),
            tuple(map(self._name, events)),
            tuple(notes),
        )

    def _of_history(self, item_ids: Sequence, times, skip_unknown: bool, notes: list) -> Queries:
        items, kept, unknown = self._find_items(item_ids, skip_unknown)
        if unknown:
            notes.append(f"{len(unknown)} unknown ids of the history were skipped: {_few(unknown)}")
        if not len(items):
            raise ValueError("the history is empty: give at least one item that the model knows")
        columns = {name for model in self.models for name in model.model.columns}
        if features := sorted(columns - {"time"}):
            notes.append(f"this model reads {', '.join(features)}, missing at all events of a given history")
        reads_times = "time" in columns
        if times is None:
            if reads_times:
                notes.append(
                    "this model reads times and none were given: all events count as simultaneous (times=)"
                )
            return Queries.one(items)
        times = np.asarray(times, np.int64)
        if len(times) != len(item_ids):
            raise ValueError(f"times: {len(times)} of them for a history of {len(item_ids)} events")
        if np.any(np.diff(times) < 0):
            raise ValueError("times must not decrease, for the oldest event comes first")
        if not reads_times:
            notes.append(f"a model of type {self.model.model_config.type!r} reads no times")
        return Queries.one(items, times[kept])

    def candidates(
        self, allow: Iterable | None = None, deny: Iterable = (), trained_only: bool = False
    ) -> Candidates:
        """Which items may be recommended.

        allow, deny: item ids; None allows all. trained_only: none without a training event, whose vectors no
        training has shaped.

        Raises ValueError if that leaves no item.
        """
        is_allowed_V = np.ones(self.model.num_items + 1, bool)
        is_allowed_V[0] = False
        reasons, notes = [], []

        def chosen(name, ids) -> np.ndarray:
            rows, _, unknown = self._find_items(ids, skip_unknown=True)
            if unknown:
                notes.append(f"{len(unknown):,} of {len(ids):,} ids to {name} are unknown: {_few(unknown)}")
            is_chosen_V = np.zeros_like(is_allowed_V)
            is_chosen_V[rows] = True
            return is_chosen_V

        if allow is not None:
            is_allowed_V &= chosen("allow", list(allow))
            reasons.append(f"{is_allowed_V.sum():,} are allowed")
        if denied := list(deny):
            is_denied_V = chosen("deny", denied)
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
        """int64[N]: numbers of users of the log. Raises ValueError naming unknown ids."""
        index = self.model.users.ids.index
        rows, _, unknown = _find(user_ids, index)
        if unknown and not skip_unknown:
            raise _unknown_error("user", unknown, index)
        return rows

    def recommend_users(
        self, users: np.ndarray, k: int = 10, *, seen: bool = False, candidates: Candidates | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(users int64[B], items int32[B, k], scores f32[B, k]) for many users, batch by batch; a score of
        -inf is no recommendation: fewer than k were left."""
        candidates, num_items = candidates or self.candidates(), self.model.num_items
        size = int(np.clip(_SCORE_BYTES // (4 * (num_items + 1)), 1, _MAX_BATCH))
        for first in range(0, len(users), size):
            batch = users[first : first + size]
            queries, exclude = self._of_users(batch)
            exclude = None if seen else exclude
            scores_BK, ids_BK, _ = self._top_k(queries, min(k, num_items), exclude, candidates)
            yield batch, ids_BK, scores_BK

    def _of_users(self, users: np.ndarray) -> tuple[Queries, tuple]:
        """(their last events, pairs (rows, items) of all that they have seen)."""
        known = self.model.users
        queries = Queries(known.columns, known.offsets[users], known.offsets[users + 1], users)
        starts, lengths = known.seen_offsets[users], known.seen_offsets[users + 1] - known.seen_offsets[users]
        rows, items = queries.seen()
        early = np.repeat(np.arange(len(users)), lengths), known.seen_items[ranges(starts, lengths)]
        return queries, (np.concatenate([rows, early[0]]), np.concatenate([items, early[1]]))

    def _top_k(self, queries: Queries, k: int, exclude, candidates: Candidates):
        """(scores f32[B, k], items int32[B, k], beams or 0), best first; -inf where no more are left."""
        beams = 0
        if self.model.model.is_generative:
            num_seen = 0 if exclude is None else int(np.bincount(exclude[0], minlength=1).max())
            beams = self._beams(k + num_seen + int((~candidates.is_allowed_V[1:]).sum()))
        if beams not in self._rankers:
            rankers = [model.ranker(self._mesh, self._dims, beams) for model in self.models]
            self._rankers[beams] = rankers[0] if len(rankers) == 1 else _ensemble(rankers)
        found = self._rankers[beams].top_k(queries, k, exclude, candidates.is_allowed_V)
        scores_BK, ids_BK = jax.device_get(found)
        if np.isnan(scores_BK).any():
            raise ValueError(f"NaN among the scores of {self.model.workdir}: the model is broken")
        return scores_BK, ids_BK, beams

    def _beams(self, needed: int) -> int:
        """Enough that a full list is left once seen items are out, unless that takes too many."""
        usual = self.model.model_config.num_beams
        needed = min(1 << (needed - 1).bit_length(), max(_MAX_BEAMS, usual))  # few shapes to compile
        return min(max(usual, needed), self.model.num_items)

    def _find_items(self, item_ids: Sequence, skip_unknown: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """(rows int32[N] of the known ids, their places among all, the unknown ids)."""
        index = self.model.item_ids.index
        rows, places, unknown = _find(item_ids, index)
        if unknown and not skip_unknown:
            raise _unknown_error("item", unknown, index)
        return rows.astype(np.int32), places, unknown

    def _notes_on(self, ids, k: int, exclude, candidates: Candidates, beams: int) -> list[str]:
        notes, num_items = [], self.model.num_items
        cold = int((self.model.train_counts[ids] == 0).sum())
        if cold:
            notes.append(
                f"{cold} of the {len(ids)} items without a training event: nothing shaped their scores "
                "(trained_only leaves such items out)"
            )
        if len(ids) == min(k, num_items):
            return notes
        left = candidates.is_allowed_V.copy()
        seen_items = [] if exclude is None else exclude[1]
        left[seen_items] = False
        if left.sum() > len(ids):
            return [*notes, f"a search with {beams:,} beams found no more than {len(ids)}"]
        num_seen = len(seen_items)
        if num_seen == num_items:
            return [*notes, f"all {num_items:,} items are in the history (seen=True recommends them again)"]
        seen = [f"{num_seen:,} are in the history (seen=True recommends them again)"] if num_seen else []
        return [*notes, f"no more are left of {num_items:,} items: {', '.join((*candidates.reasons, *seen))}"]

    def _name(self, item: int) -> tuple[str, str]:
        return self.model.item_ids[item], self.model.titles[item]


def _ensemble(rankers):
    from rec_jax.eval.ensemble import EnsembleRanker

    return EnsembleRanker(rankers)


def _find(wanted: Sequence, index: dict[str, int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(rows of the known ids, their places in `wanted`, the unknown ids)."""
    wanted = [str(text).strip() for text in wanted]
    is_known = [text != "" and text in index for text in wanted]
    rows = np.array([index[text] for text, known in zip(wanted, is_known, strict=True) if known], np.int64)
    unknown = [text for text, known in zip(wanted, is_known, strict=True) if not known]
    return rows, np.flatnonzero(is_known), unknown


def _unknown_error(kind: str, unknown: list[str], index: dict[str, int]) -> ValueError:
    near = difflib.get_close_matches(unknown[0], list(index)[:100_000], n=3)
    hint = f"; near {unknown[0]!r}: {', '.join(near)}" if near else ""
    skip = "; skip_unknown leaves such ids out" if kind == "item" else ""
    return ValueError(f"unknown {kind} ids, in no event of the training log: {_few(unknown)}{hint}{skip}")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more
