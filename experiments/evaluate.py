"""Evaluates trained runs and baselines on the split with which the runs were trained.

python -m experiments.evaluate --workdir=runs/ml1m --split=test
python -m experiments.evaluate --workdir=runs/ml1m --dims=32    # only the first 32 dims (loss.matryoshka)
python -m experiments.evaluate --workdir=run0,run1,run2         # a comparison, and their ensemble
python -m experiments.evaluate --workdir=runs/ml1m --config.eval.sampled_negatives=100   # any key of eval

Prints the metrics and writes them to evaluation_SPLIT.json in the working directory. Several runs are
compared with the best of them; metrics and a plot go to comparison_SPLIT.json and comparison_SPLIT.png in
the first working directory.
"""

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.launch import known_keys, launch

_WORKDIR = flags.DEFINE_list(
    "workdir", None, "Directory of a trained run. Several, separated by commas, are compared."
)
_SPLIT = flags.DEFINE_enum("split", "test", ["val", "test"], "The held-out part to evaluate.")
_DIMS = flags.DEFINE_integer(
    "dims", 0, "Score by the first DIMS dims of the vectors (loss.matryoshka); 0 = all.", lower_bound=0
)
flags.declare_key_flag("coordinator")
flags.declare_key_flag("num_processes")
flags.declare_key_flag("process_id")
flags.mark_flag_as_required("workdir")


def main():
    from rec_jax.experiment import Experiment, write_json
    from rec_jax.report import plot_comparison, print_better_baselines, print_breakdown, print_scores
    from rec_jax.train.monitor import read_metrics
    from rec_jax.trained import TrainedModel, check_same_split

    models = [TrainedModel.load(workdir) for workdir in dict.fromkeys(_WORKDIR.value)]
    check_same_split(models)
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    experiment, part = Experiment.open(_WORKDIR.value[0], overrides), _SPLIT.value
    rankers = _rankers(models, experiment.mesh)
    scores = {name: experiment.evaluate(ranker, part) for name, ranker in rankers.items()}
    baselines = experiment.evaluate_baselines(part)
    print_scores(scores | baselines, part=part)
    print_better_baselines(scores, baselines)
    suffix = f"_{_DIMS.value}dims" if _DIMS.value else ""
    if len(models) == 1:
        print_breakdown(scores["model"])
        path = experiment.workdir / f"evaluation_{part}{suffix}.json"
    else:
        _compare(experiment, rankers, scores)
        path = experiment.workdir / f"comparison_{part}{suffix}.json"
        curves = {str(model.workdir): read_metrics(model.workdir / "metrics.jsonl") for model in models}
        plot_comparison(scores, baselines, curves, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")
    write_json(path, scores | baselines)
    print(f"wrote {path}")


def _rankers(models, mesh) -> dict:
    """Returns {name: ranker} of one model, or of each model and their ensemble."""
    from rec_jax.eval.ensemble import EnsembleRanker

    rankers = {str(model.workdir): model.ranker(mesh, _DIMS.value) for model in models}
    if len(models) == 1:
        return {"model": rankers.popitem()[1]}
    generative = [str(model.workdir) for model in models if model.model.is_generative]
    if generative:
        print(
            f"note: not in the ensemble: {', '.join(generative)}, which scores only the items that its beam "
            "search finds"
        )
    members = [ranker for name, ranker in rankers.items() if name not in generative]
    return rankers | ({"ensemble": EnsembleRanker(members)} if len(members) > 1 else {})


def _compare(experiment, rankers: dict, scores: dict[str, dict]) -> None:
    """Compares the best run with the others: prints the difference of NDCG@10, its bootstrap interval and the
    p-value of a paired randomization test, and adds them to the scores of the best as "over"."""
    from rec_jax.eval.evaluator import per_example
    from rec_jax.eval.metrics import bootstrap_interval, paired_test
    from rec_jax.report import print_table

    config, seed = experiment.config.eval, experiment.config.seed

    def values(ranker):
        metrics = per_example(ranker, experiment.histories, experiment.split, _SPLIT.value, config, seed)
        return metrics["ndcg@10"], metrics["users"]

    best = max(scores, key=lambda name: scores[name]["ndcg@10"])
    (ours, users), over, rows = values(rankers[best]), {}, []
    for name, ranker in rankers.items():
        if name == best:
            continue
        theirs, _ = values(ranker)
        difference = ours - theirs
        low, high = bootstrap_interval(difference, 1000, seed, users=users)
        p = paired_test(ours, theirs, 2000, seed, users)
        over[name] = {"difference": float(difference.mean()), "difference_ci": [low, high], "p": p}
        rows.append((name, f"{difference.mean():.4f}", f"{low:.4f}..{high:.4f}", f"{p:.4f}"))
    print()
    print_table((f"ndcg@10 of {best}, the best, minus that of", "difference", "95 % interval", "p"), rows)
    scores[best]["over"] = over


def _define_config():
    """Defines a flag for each key of the config section eval. Flags that are not given change nothing."""
    from rec_jax.config import to_config_dict
    from rec_jax.eval.evaluator import EvalConfig

    cfg = ConfigDict({"eval": to_config_dict(EvalConfig())})
    with known_keys():
        return config_flags.DEFINE_config_dict(
            "config",
            cfg,
            "Changes to the run's config; only keys of eval. A key that is not given keeps the value of the "
            "run, not the default shown here.",
        )


if __name__ == "__main__":
    _define_config()
    launch(main)
