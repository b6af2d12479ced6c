"""Recommends items to a user of the log, or to anyone with a history, under your own ids.

python -m experiments.recommend --workdir=runs/ml1m --user=42 --k=10
python -m experiments.recommend --workdir=runs/ml1m --history=260,1196,1210
"""

import difflib

import numpy as np
from absl import flags

from experiments.launch import launch

_WORKDIR = flags.DEFINE_list("workdir", None, "Directory of a trained run, or several, separated by commas.")
_USER = flags.DEFINE_string("user", None, "A user id of the log; all of that user's events are used.")
_HISTORY = flags.DEFINE_list("history", None, "Item ids, oldest first, separated by commas.")
_K = flags.DEFINE_integer("k", 10, "How many items to recommend.", lower_bound=1)
_SEEN = flags.DEFINE_bool("seen", False, "Recommend items of the history again, too.")
_DIMS = flags.DEFINE_integer("dims", 0, "Score by so many first dims; 0 = by all.", lower_bound=0)
flags.mark_flag_as_required("workdir")


def main():
    from rec_jax.eval.ensemble import EnsembleScorer, check_same_split
    from rec_jax.experiment import Experiment

    if (_USER.value is None) == (_HISTORY.value is None):
        raise ValueError("give either --user=ID or --history=ID,ID,...")
    runs = [Experiment.open(workdir) for workdir in _WORKDIR.value]
    check_same_split(runs)
    experiment = runs[0]
    histories = experiment.histories
    if _USER.value is not None:
        user = _find([_USER.value], histories.user_ids, "user")[0]
        events = slice(*histories.offsets[user : user + 2])
        items, times = histories.items[events], None if histories.times is None else histories.times[events]
    else:
        items, times = _find(_HISTORY.value, histories.item_ids, "item"), None

    scorers = [run.best_scorer(_DIMS.value) for run in runs]
    scorer = scorers[0] if len(scorers) == 1 else EnsembleScorer(scorers)
    scores = np.array(scorer.score_history(items, times))
    if not _SEEN.value:
        scores[items] = -np.inf
    top = [item for item in np.argsort(-scores, kind="stable")[: _K.value] if scores[item] > -np.inf]
    print(f"history of {len(items)} events, the last of them:")
    for item in items[-5:]:
        print(f"  {_name(histories, item)}")
    print(f"the {len(top)} best next items:")
    for rank, item in enumerate(top, 1):
        print(f"{rank:4d}  score {scores[item]:8.3f}  {_name(histories, item)}")


def _find(wanted: list[str], known: np.ndarray, kind: str) -> np.ndarray:
    """Row numbers of the user's own ids. Raises ValueError naming every id that is not known."""
    rows = {str(name): row for row, name in enumerate(known)}
    wanted = [name.strip() for name in wanted]
    unknown = [name for name in wanted if not name or name not in rows]
    if unknown:
        near = difflib.get_close_matches(unknown[0], rows, n=3)
        hint = f"; near {unknown[0]!r}: {', '.join(near)}" if near else ""
        raise ValueError(f"unknown {kind} ids, in no event of the training log: {unknown}{hint}")
    return np.array([rows[name] for name in wanted])


def _name(histories, item: int) -> str:
    item_id = str(histories.item_ids[item])
    title = histories.titles[item_id] if item_id in histories.titles else ""
    return f"{item_id}  {title}".rstrip()


if __name__ == "__main__":
    launch(main)
