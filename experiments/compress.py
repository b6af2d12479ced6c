"""Makes a trained run smaller and faster, and measures the loss of quality.

    python -m experiments.compress --workdir=runs/ml1m --output=runs/int8 --config.compress.recipe=int8
    python -m experiments.compress --workdir=runs/ml1m --output=runs/mine \\
        --config.compress.prune.names='.*kernel' --config.compress.prune.share=0.8 --config.train.epochs=5
    python -m experiments.compress --workdir=runs/ml1m --output=runs/pareto --suite=pareto
    python -m experiments.compress --workdir=runs/ml1m --output=runs/diagnosis --suite=diagnose

The config is that of the trained run; the recipe overrides it, and flags override both. The steps, in this
order:

1. The architecture is shrunk (compress.shrink), or replaced by a student (a smaller model.*, with
   compress.distill.teachers).
2. Training continues if masks, teachers, adapters or quantization-aware training are set (compress.prune,
   distill, lora, quant.aware), with the settings train.*, optim.* and precision.*.
3. The result is stored in --output/model; the parameters that compress.quant names are stored in integers.

The output is a run like any other: experiments.evaluate and experiments.recommend take it as --workdir. To
resume an interrupted compression, run the same command again.

--suite=pareto applies all standard recipes and writes pareto.json, pareto.md and pareto.png. For each recipe
they contain:

- ndcg_kept and hr_kept: test NDCG@10 and HR@10 divided by the parent's, with 95 % intervals of paired
  resamples of examples;
- bytes_ratio (disk), memory_ratio, params_ratio and flops_ratio (multiply-adds): divided by the parent's, so
  less is better;
- p50 and p99 milliseconds of a top-10 recommendation for 1 and for 64 users, with calls of all models
  interleaved;
- the number of operations that the compiler counts in each program.

--suite=diagnose prints norms, gradients and zeros of each parameter, and the validation quality after pruning
one parameter at a time.
"""

import contextlib
import itertools
import json
import pathlib
import re
import sys

import jax
from absl import flags
from ml_collections import config_flags

from experiments.launch import known_keys, launch, switch_types

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained run.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Directory of the compressed run; created if it does not exist."
)
_SUITE = flags.DEFINE_enum(
    "suite",
    None,
    ["pareto", "diagnose"],
    "pareto: compare the standard recipes; diagnose: see which weights matter.",
)
_RECIPES = flags.DEFINE_list(
    "recipes", None, "Only for --suite=pareto: the recipes to compare (default: all)."
)
flags.mark_flags_as_required(["workdir", "output"])

_SHARES = (0.3, 0.5, 0.7, 0.9)  # of a parameter's weights that a diagnosis sets to 0


def main():
    from rec_jax.experiment import Experiment

    if jax.process_count() > 1:
        raise ValueError("--num_processes: experiments.compress runs in one process only; leave the flag out")
    if _RECIPES.value and _SUITE.value != "pareto":
        raise ValueError(
            f"--recipes={','.join(_RECIPES.value)} needs --suite=pareto: add it, or set compress.recipe"
        )
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    parent, output = Experiment.open(_WORKDIR.value), pathlib.Path(_OUTPUT.value)
    if output.resolve() == parent.workdir.resolve():
        raise ValueError(f"--output={output} is the trained run itself: name another directory")
    if _SUITE.value == "diagnose":
        _diagnose(parent, output)
    elif _SUITE.value == "pareto":
        _compare(parent, output, overrides)
    else:
        _compress(parent, output, overrides)


def _compress(parent, output, overrides):
    from experiments import pareto
    from rec_jax.experiment import write_json
    from rec_jax.recipes import compress, recipe_config

    rows = pareto.measure(parent, {"compressed": compress(parent, recipe_config(parent, overrides), output)})
    pareto.print_rows(rows)
    command = " ".join(["python -m experiments.compress", *sys.argv[1:]])
    write_json(output / "result.json", rows | {"command": command})
    print(f"wrote {output / 'model'} and {output / 'result.json'}")


def _compare(parent, output, overrides):
    from experiments import pareto
    from rec_jax.recipes import RECIPES, compress, recipe_config, will_train

    def config_of(recipe):
        """The config of a recipe. Recipes that do not train ignore the overrides of training settings."""
        training = ("train.", "optim.", "precision.")
        others = {name: value for name, value in overrides.items() if not name.startswith(training)}
        config = recipe_config(parent, {**others, "compress.recipe": recipe})
        if not will_train(parent, config):
            return config
        return recipe_config(parent, {**overrides, "compress.recipe": recipe})

    configs = {recipe: config_of(recipe) for recipe in _RECIPES.value or RECIPES}
    runs = {}
    for recipe, config in configs.items():
        print(f"\n--- {recipe}", flush=True)
        runs[recipe] = compress(parent, config, output / recipe)
    rows = pareto.measure(parent, runs)
    pareto.print_rows(rows)
    pareto.write(rows, output)
    print(f"wrote {output / 'pareto.json'}, {output / 'pareto.md'} and {output / 'pareto.png'}")


def _diagnose(parent, output):
    from rec_jax.compress.diagnose import sensitivity, weight_table
    from rec_jax.experiment import write_json
    from rec_jax.recipes import WEIGHTS, plain_params, training_gradients
    from rec_jax.report import print_table

    params = jax.device_put(plain_params(parent))
    tables = {"weights": weight_table(params, training_gradients(parent, params))}
    print_table(*tables["weights"])

    def evaluate(params) -> float:
        return parent.evaluate(parent.plain_ranker(params), "val", quick=True)["ndcg@10"]

    tables["sensitivity"] = sensitivity(params, WEIGHTS, _SHARES, evaluate)
    print("\nvalidation NDCG@10 when this share of a single parameter is pruned, without training:")
    print_table(*tables["sensitivity"])
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "diagnosis.json", tables)
    print(f"wrote {output / 'diagnosis.json'}")


def _define_config():
    """Defines a flag for every key of the trained run's config."""
    config = switch_types(_config_of_run())
    with known_keys():
        return config_flags.DEFINE_config_dict("config", config, "Changes to the config of the trained run.")


def _config_of_run():
    """The config of the run in --workdir, read from sys.argv because flags are not parsed yet; the default
    config if no run can be read."""
    from configs.common import base
    from rec_jax.config import build, to_config_dict
    from rec_jax.run_config import ExperimentConfig

    for flag, after in itertools.pairwise([*sys.argv, ""]):
        if match := re.fullmatch(r"--?workdir(?:=(.*))?", flag):
            path = pathlib.Path(match[1] or after) / "config.json"
            with contextlib.suppress(OSError, ValueError):  # opening the run reports the error later
                return to_config_dict(build(ExperimentConfig, json.loads(path.read_text())))
    return base()


if __name__ == "__main__":
    _CONFIG = _define_config()
    launch(main)
