"""Recommends items to a user of the log, or to anyone with a history, under your own ids.

python -m experiments.recommend --workdir=runs/ml1m --user=42 --k=10
python -m experiments.recommend --workdir=runs/ml1m --history=260,1196,1210
"""

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
    from rec_jax.eval.ensemble import EnsembleRanker, check_same_split
    from rec_jax.experiment import Experiment
    from rec_jax.recommend import events_of, items_of, name, recommend

    if (_USER.value is None) == (_HISTORY.value is None):
        raise ValueError("give either --user=ID or --history=ID,ID,...")
    runs = [Experiment.open(workdir) for workdir in _WORKDIR.value]
    check_same_split(runs)
    histories = runs[0].histories
    if _USER.value is not None:
        items, times = events_of(histories, _USER.value)
    else:
        items, times = items_of(histories, _HISTORY.value), None
    rankers = [run.best_scorer(_DIMS.value) for run in runs]
    ranker = rankers[0] if len(rankers) == 1 else EnsembleRanker(rankers)
    best = recommend(ranker, histories, items, times, k=_K.value, seen=_SEEN.value)

    print(f"history of {len(items)} events, the last of them:")
    for item in items[-5:]:
        print("  " + "  ".join(name(histories, item)).rstrip())
    print(f"the {len(best)} best next items:")
    for rank, found in enumerate(best, 1):
        print(f"{rank:4d}  score {found.score:8.3f}  {found}")


if __name__ == "__main__":
    launch(main)
