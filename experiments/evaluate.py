"""Scores the best checkpoint of a run, beside the baselines on the same split.

python -m experiments.evaluate --workdir=runs/ml1m --split=test
"""

from absl import flags

from experiments.launch import launch

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained run.")
_SPLIT = flags.DEFINE_enum("split", "test", ["val", "test"], "Which held-out part to score.")
flags.declare_key_flag("coordinator")
flags.declare_key_flag("num_processes")
flags.declare_key_flag("process_id")
flags.mark_flag_as_required("workdir")


def main():
    from rec_jax.experiment import Experiment, write_json
    from rec_jax.report import print_breakdown, print_scores

    experiment = Experiment.open(_WORKDIR.value)
    model = experiment.evaluate(experiment.best_scorer(), _SPLIT.value)
    scores = {"model": model, **experiment.evaluate_baselines(_SPLIT.value)}
    print_scores(scores, part=_SPLIT.value)
    print_breakdown(model)
    path = experiment.workdir / f"evaluation_{_SPLIT.value}.json"
    write_json(path, scores)
    print(f"wrote {path}")


if __name__ == "__main__":
    launch(main)
