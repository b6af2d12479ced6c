"""Evaluates the trained model of a run, and baselines, on the split with which it was trained.

python -m experiments.evaluate --workdir=runs/ml1m --split=test
python -m experiments.evaluate --workdir=runs/ml1m --dims=32    # only the first 32 dims (loss.matryoshka)
python -m experiments.evaluate --workdir=run0,run1,run2         # each run, and the mean of their scores
python -m experiments.evaluate --workdir=runs/ml1m --config.eval.sampled_negatives=100   # any key of eval

Prints the metrics and writes them to evaluation_SPLIT.json in the (first) working directory.
"""

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.launch import known_keys, launch

_WORKDIR = flags.DEFINE_list(
    "workdir", None, "Directory of a trained run. Several, separated by commas, form an ensemble."
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
    from rec_jax.eval.ensemble import EnsembleRanker
    from rec_jax.experiment import Experiment, write_json
    from rec_jax.report import print_breakdown, print_scores
    from rec_jax.trained import TrainedModel, check_same_split

    models = [TrainedModel.load(workdir) for workdir in _WORKDIR.value]
    check_same_split(models)
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    experiment, part = Experiment.open(_WORKDIR.value[0], overrides), _SPLIT.value
    rankers = {str(model.workdir): model.ranker(experiment.mesh, _DIMS.value) for model in models}
    is_one = len(models) == 1
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
    """Prints and returns the ratio of the ensemble's NDCG@10 to that of each run, with its bootstrap interval
    and the p-value of a paired randomization test."""
    from rec_jax.eval.evaluator import per_example
    from rec_jax.eval.metrics import bootstrap_ratio, paired_test
    from rec_jax.report import print_table

    config, seed = experiment.config.eval, experiment.config.seed

    def values(ranker):
        metrics = per_example(ranker, experiment.histories, experiment.split, _SPLIT.value, config, seed)
        return metrics["ndcg@10"], metrics["users"]

    (ours, users), over, rows = values(ensemble), {}, []
    for name, ranker in rankers.items():
        theirs, _ = values(ranker)
        ratio, (low, high) = bootstrap_ratio(ours, theirs, 1000, seed, users=users)
        p = paired_test(ours, theirs, 2000, seed, users)
        over[name] = {"ratio": ratio, "ratio_ci": [low, high], "p": p}
        rows.append((name, f"{ratio:.3f}", f"{low:.3f}..{high:.3f}", f"{p:.4f}"))
    print_table(("ndcg@10 of the ensemble over", "times", "95 % interval", "p"), rows)
    return over


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
