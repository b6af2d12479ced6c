"""Scores the best checkpoint of a run, beside the baselines on the same split.

python -m experiments.evaluate --workdir=runs/ml1m --split=test
python -m experiments.evaluate --workdir=runs/ml1m --dims=32    # by the first dims alone (loss.matryoshka)
python -m experiments.evaluate --workdir=run0,run1,run2         # each, and the mean of their scores
"""

from absl import flags

from experiments.launch import launch

_WORKDIR = flags.DEFINE_list("workdir", None, "Directory of a trained run, or several, separated by commas.")
_SPLIT = flags.DEFINE_enum("split", "test", ["val", "test"], "Which held-out part to score.")
_DIMS = flags.DEFINE_integer("dims", 0, "Score by so many first dims; 0 = by all.", lower_bound=0)
flags.declare_key_flag("coordinator")
flags.declare_key_flag("num_processes")
flags.declare_key_flag("process_id")
flags.mark_flag_as_required("workdir")


def main():
    from rec_jax.eval.ensemble import EnsembleRanker, check_same_split
    from rec_jax.experiment import Experiment, write_json
    from rec_jax.report import print_breakdown, print_scores

    runs = [Experiment.open(workdir) for workdir in _WORKDIR.value]
    check_same_split(runs)
    experiment, part = runs[0], _SPLIT.value
    rankers = {str(run.workdir): run.best_scorer(_DIMS.value) for run in runs}
    is_one = len(runs) == 1
    model = next(iter(rankers.values())) if is_one else EnsembleRanker(rankers.values())
    singles = {} if is_one else {name: experiment.evaluate(each, part) for name, each in rankers.items()}
    scores = {"model" if is_one else "ensemble": experiment.evaluate(model, part)}
    scores = singles | scores | experiment.evaluate_baselines(part)
    print_scores(scores, part=part)
    if is_one:
        print_breakdown(scores["model"])
    else:
        scores["ensemble"]["over"] = _compare(experiment, model, rankers)
    suffix = (f"_{_DIMS.value}dims" if _DIMS.value else "") + ("" if is_one else "_ensemble")
    path = experiment.workdir / f"evaluation_{part}{suffix}.json"
    write_json(path, scores)
    print(f"wrote {path}")


def _compare(experiment, ensemble, rankers: dict) -> dict[str, dict]:
    """NDCG@10 of the ensemble over that of each run, with the interval of paired resamples and the p of a
    paired randomization test."""
    from rec_jax.eval.evaluator import per_example
    from rec_jax.eval.metrics import bootstrap_ratio, paired_test
    from rec_jax.report import print_table

    config, seed = experiment.config.eval, experiment.config.seed

    def values(ranker):
        found = per_example(ranker, experiment.histories, experiment.split, _SPLIT.value, config, seed)
        return found["ndcg@10"], found["users"]

    (ours, users), over, rows = values(ensemble), {}, []
    for name, ranker in rankers.items():
        theirs, _ = values(ranker)
        ratio, (low, high) = bootstrap_ratio(ours, theirs, 1000, seed, users=users)
        p = paired_test(ours, theirs, 2000, seed, users)
        over[name] = {"ratio": ratio, "ratio_ci": [low, high], "p": p}
        rows.append((name, f"{ratio:.3f}", f"{low:.3f}..{high:.3f}", f"{p:.4f}"))
    print_table(("ndcg@10 of the ensemble over", "times", "95 % interval", "p"), rows)
    return over


if __name__ == "__main__":
    launch(main)
