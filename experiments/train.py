"""Trains a sequence recommender on a log of interactions and tests the best model once at the end.

    python -m experiments.train --config=configs/sasrec_ml1m.py --workdir=runs/ml1m
    python -m experiments.train --config=configs/sasrec_ml1m.py:smoke --workdir=/tmp/smoke
    python -m experiments.train --config=configs/log.py:sasrec --workdir=runs/mine \\
        --config.data.path=my.csv \\
        --config.data.user=customer --config.data.item=product --config.data.time=when

Every key of the config is a flag: `--config.section.key=value`. The name of a variant, such as smoke, follows
the config file after a colon. Run the same command again to resume a run that was stopped or killed. The run
writes config.json, metrics.jsonl, tensorboard/, checkpoints/, model/ (the best model so far), curves.png and
result.json into the working directory.
"""

import dataclasses
import sys

from absl import flags

from experiments.launch import define_config, launch

_CONFIG = define_config("Config file, optionally with :variant.")
flags.declare_key_flag("config")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run. Created if it does not exist.")
_KEEP_USERS = flags.DEFINE_bool(
    "keep_users",
    True,
    "Store the users' ids and last events with the trained model, so that it can recommend to them by id.",
)
flags.declare_key_flag("coordinator")
flags.declare_key_flag("num_processes")
flags.declare_key_flag("process_id")
flags.mark_flags_as_required(["config", "workdir"])


def main():
    from rec_jax.config import build
    from rec_jax.experiment import Experiment, ExperimentConfig, write_json
    from rec_jax.report import print_better_baselines, print_scores

    config = build(ExperimentConfig, _CONFIG.value)
    if config.compress.recipe:
        raise ValueError(
            f"compress.recipe={config.compress.recipe!r} is for experiments.compress, which starts from a "
            "trained run: use that command, or set compress.prune, distill or quant here (CompressConfig)"
        )
    experiment = Experiment(config, _WORKDIR.value)
    print(experiment.describe())
    fitted = experiment.fit(_KEEP_USERS.value)

    ranker = experiment.ranker(fitted.best_params)
    fitted = dataclasses.replace(fitted, state=None, best_params=None)  # free memory: tables can be large
    val, test = (experiment.evaluate(ranker, part) for part in ("val", "test"))
    baselines = experiment.evaluate_baselines("test")
    print_scores({"model": test, **baselines}, part="test")
    print_better_baselines({"model": test}, baselines)
    write_json(
        experiment.workdir / "result.json",
        {
            "val": val,
            "test": test,
            "baselines": baselines,
            "train_secs": fitted.progress.train_secs,
            "compile_secs": fitted.progress.compile_secs,
            "eval_secs": fitted.progress.eval_secs,
            "real_tokens_per_sec": fitted.progress.tokens_per_sec,
            "steps": fitted.steps,
            "best_step": fitted.best_step,
            "stopped_by": fitted.stopped_by,
            "params": experiment.num_params,
            "seed": config.seed,
            "split_checksum": experiment.split.checksum,
            "command": " ".join(["python -m experiments.train", *sys.argv[1:]]),
        },
    )
    print(f"wrote {experiment.workdir / 'result.json'} and {experiment.workdir / 'curves.png'}")


if __name__ == "__main__":
    launch(main)
