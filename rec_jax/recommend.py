"""The best next items after a history, under the ids of the log.

recommender = rec_jax.load("runs/mine")
recommender.recommend(["i5", "i6"], k=10)
recommender.recommend(user="u7", k=10, trained_only=True)
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

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
class _Histories:
    """Histories to continue: b is items[starts[b]:ends[b]]. seen_rows, seen_items: pairs not to recommend."""

    items: np.ndarray
    times: np.ndarray | None
    starts: np.ndarray
    ends: np.ndarray
    seen_rows: np.ndarray
    seen_items: np.ndarray


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
        self._scorers = {}

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
            histories = self._of_users(self.find_users([user]), seen)
        else:
            items, kept, unknown = self._find_items(history, skip_unknown)
            if unknown:
                notes.append(f"{len(unknown)} unknown ids of the history were skipped: {_few(unknown)}")
            if not len(items):
                raise ValueError("the history is empty: give at least one item that the model knows")
            times = self._check_times(times, len(history), notes)
            times = None if times is None else times[kept]
            seen_items = np.empty(0, np.int32) if seen else np.unique(items)
            bounds = np.array([0]), np.array([len(items)])
            histories = _Histories(items, times, *bounds, np.zeros_like(seen_items), seen_items)
        scores, ids, beams = self._top_k(histories, k, candidates)
        ids = ids[0][scores[0] > -np.inf]
        notes += [*candidates.notes, *self._notes_on(ids, k, histories, candidates, beams)]
        found = [
            Recommendation(*self._name(item), float(score))
            for item, score in zip(ids, scores[0], strict=False)
        ]
        events = histories.items[histories.starts[0] : histories.ends[0]]
        return Recommendations(tuple(found), tuple(map(self._name, events)), tuple(notes))

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
        candidates = candidates or self.candidates()
        size = int(np.clip(_SCORE_BYTES // (4 * (self.model.num_items + 1)), 1, _MAX_BATCH))
        k = min(k, self.model.num_items)
        for first in range(0, len(users), size):
            batch = users[first : first + size]
            scores_BK, ids_BK, _ = self._top_k(self._of_users(batch, seen), k, candidates)
            yield batch, ids_BK, scores_BK

    def _of_users(self, users: np.ndarray, seen: bool) -> _Histories:
        """Their last events. What they have seen is among these, or among the items of earlier ones."""
        known = self.model.users
        starts, ends = known.offsets[users], known.offsets[users + 1]
        rows = [np.empty(0, np.int32)]
        items = [np.empty(0, np.int32)]
        if not seen:
            for row, user in enumerate(users):
                early = known.seen_items[slice(*known.seen_offsets[user : user + 2])]
                items.append(np.unique(np.concatenate([known.items[starts[row] : ends[row]], early])))
                rows.append(np.full(len(items[-1]), row, np.int32))
        return _Histories(known.items, known.times, starts, ends, np.concatenate(rows), np.concatenate(items))

    def _top_k(self, histories: _Histories, k: int, candidates: Candidates):
        """(scores f32[B, K], items int32[B, K], beams or 0), best first, K = k or the whole catalogue."""
        num_seen = int(np.bincount(histories.seen_rows, minlength=1).max(initial=0))
        beams = 0
        if self.model.model.generates:
            beams = self._beams(k + num_seen + int((~candidates.is_allowed_V[1:]).sum()))
        size = 1 << max(10, (len(histories.seen_items) - 1).bit_length())  # few shapes to compile
        pad = (0, size - len(histories.seen_items))
        rows_P = np.pad(histories.seen_rows, pad, constant_values=len(histories.ends))
        items_P = np.pad(histories.seen_items, pad)
        scores_BV = self._scores(histories, beams)
        k = min(k, self.model.num_items)
        scores_BK, ids_BK = jax.device_get(_best(scores_BV, rows_P, items_P, candidates.is_allowed_V, k))
        if np.isnan(scores_BK).any():
            raise ValueError(f"NaN among the scores of {self.model.workdir}: the model is broken")
        return scores_BK, ids_BK, beams

    def _beams(self, needed: int) -> int:
        """Enough that a full list is left once seen items are out, unless that takes too many."""
        usual = self.model.model_config.num_beams
        needed = min(1 << (needed - 1).bit_length(), max(_MAX_BEAMS, usual))  # few shapes to compile
        return min(max(usual, needed), self.model.num_items)

    def _scores(self, histories: _Histories, beams: int) -> jax.Array:
        """f32[B, V + 1] of the events after the histories."""
        if beams not in self._scorers:
            about = _Catalogue(self.model.num_items)
            self._scorers[beams] = [
                model.scorer(about, self._mesh, self._dims, beams) for model in self.models
            ]
        lengths, times = histories.ends - histories.starts, None
        if any(model.model.reads_times for model in self.models):
            times = np.zeros(len(histories.items), np.int64) if histories.times is None else histories.times
        each = [
            scorer.score(histories.items, histories.ends, lengths, times if model.model.reads_times else None)
            for model, scorer in zip(self.models, self._scorers[beams], strict=True)
        ]
        if len(each) == 1:
            return each[0]
        from rec_jax.eval.ensemble import standardised

        return sum(map(standardised, each)) / len(each)

    def _find_items(self, item_ids: Sequence, skip_unknown: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """(rows int32[N] of the known ids, their places among all, the unknown ids)."""
        index = self.model.item_ids.index
        rows, places, unknown = _find(item_ids, index)
        if unknown and not skip_unknown:
            raise _unknown_error("item", unknown, index)
        return rows.astype(np.int32), places, unknown

    def _check_times(self, times, num_events: int, notes: list) -> np.ndarray | None:
        if times is None:
            if self.model.model.reads_times:
                notes.append(
                    "this model reads times and none were given: all events count as simultaneous (times=)"
                )
            return None
        times = np.asarray(times, np.int64)
        if len(times) != num_events:
            raise ValueError(f"times: {len(times)} of them for a history of {num_events} events")
        if np.any(np.diff(times) < 0):
            raise ValueError("times: they must not decrease, for the oldest event comes first")
        if not self.model.model.reads_times:
            notes.append(f"times do not matter to a model of type {self.model.model_config.type!r}")
        return times

    def _notes_on(self, ids, k: int, histories: _Histories, candidates: Candidates, beams: int) -> list[str]:
        notes, num_items = [], self.model.num_items
        cold = int((self.model.train_counts[ids] == 0).sum())
        if cold:
            notes.append(
                f"{cold} of these items are in no training event, so that nothing shaped their scores "
                "(trained_only leaves them out)"
            )
        if len(ids) == min(k, num_items):
            return notes
        left = candidates.is_allowed_V.copy()
        left[histories.seen_items] = False
        if left.sum() > len(ids):
            return [*notes, f"a search with {beams:,} beams found no more than {len(ids)}"]
        num_seen = len(histories.seen_items)
        if num_seen == num_items:
            return [*notes, f"all {num_items:,} items are in the history (seen=True recommends them again)"]
        seen = [f"{num_seen:,} are in the history (seen=True recommends them again)"] if num_seen else []
        return [*notes, f"no more are left of {num_items:,} items: {', '.join((*candidates.reasons, *seen))}"]

    def _name(self, item: int) -> tuple[str, str]:
        return self.model.item_ids[item], self.model.titles[item]


@dataclass(frozen=True)
class _Catalogue:
    """All that a scorer of given histories asks of a data set."""

    num_items: int


@partial(jax.jit, static_argnames="k")
def _best(scores_BV, rows_P, items_P, is_allowed_V, k: int):
    """(scores f32[B, k], items int32[B, k]); a pair of a row beyond B is dropped."""
    scores_BV = jnp.where(is_allowed_V, scores_BV.astype(jnp.float32), -jnp.inf)
    return jax.lax.top_k(scores_BV.at[rows_P, items_P].set(-jnp.inf, mode="drop"), k)


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
