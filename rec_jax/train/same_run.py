"""What may change between two sessions of a run: all that does not change what its steps compute."""

import json
import pathlib

from flax.traverse_util import flatten_dict

# They steer when a run stops, what it writes down and how its work is divided; another mesh only rounds
# differently.
_FREE = (
    "config.data.path",  # the split and the vocabulary are compared themselves
    "config.train.epochs",  # where no setting is a share of the whole training
    "config.train.patience",
    "config.train.checkpoint_every_steps",
    "config.train.log_every_steps",
    "config.train.keep_checkpoints",
    "config.train.micro_rows",
    "config.table.capacity_factor",
    "config.mesh.data",
    "config.mesh.model",
    "config.mesh.fully_sharded",
    # Not among these: filter_seen and max_examples define the validation metric that picks the best.
    "config.eval.ks",
    "config.eval.bootstrap",
    "config.eval.sampled_negatives",
    "config.eval.baselines",
    "config.eval.batch_bytes",
)


def plain_json(tree: dict) -> dict:
    """`tree` as JSON gives it back: lists for tuples, numbers for NumPy scalars."""
    return json.loads(json.dumps(tree, default=lambda value: value.item()))


def _flat(tree: dict) -> dict:
    return flatten_dict(plain_json(tree), sep=".")


def changes(saved: dict, current: dict) -> dict[str, str]:
    """{"config.train.epochs": "saved 3, now 4"}: the keys whose values differ."""
    saved, current = _flat(saved), _flat(current)
    return {
        key: f"saved {saved.get(key, 'nothing')}, now {current.get(key, 'nothing')}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    }


def check_same_run(saved: dict, current: dict, path: pathlib.Path, *, is_finished: bool) -> None:
    """Raises ValueError, naming the keys, if the run in `path` must not resume with other settings.

    The keys above may always change, the length of the run only where no setting is a share of it. All of
    `eval` may change once the run is finished, with nothing left to train and to evaluate; before that, what
    defines the validation metric may not: evaluations of two kinds cannot be compared to pick the best.
    """
    different = changes(saved, current)
    wrong = [
        f"{key} ({values})"
        for key, values in different.items()
        if key not in _FREE and not (is_finished and key.startswith("config.eval."))
    ]
    if wrong:
        raise ValueError(
            f"the run saved in {path} is another one: {'; '.join(wrong)}. Use a new workdir for the changed "
            "run, or the saved values to resume this one"
        )
    shares = _shares_of_the_length(_flat(current))
    if "config.train.epochs" in different and shares:
        raise ValueError(
            f"train.epochs ({different['config.train.epochs']}): the run saved in {path} cannot be made "
            f"longer or shorter, because {', '.join(shares)} follows the share of the training that is done, "
            "which would jump. Resume it with the saved train.epochs, or train for another length in a new "
            "workdir. A run can be extended if it has optim.schedule='constant', no pruning, and "
            "quantization-aware training, if any, from the first step"
        )


def _shares_of_the_length(current: dict) -> list[str]:
    """The settings that a change of train.epochs would move: the step that a run has come to would suddenly
    have another learning rate, another share of zeros, or integers."""

    def shown(*keys) -> str:
        return " ".join(f"{key}={current[f'config.{key}']!r}" for key in keys)

    found = []
    if current.get("config.optim.schedule", "constant") != "constant":
        found.append(shown("optim.schedule"))
    if current.get("config.compress.prune.names") and current["config.compress.prune.end"] > 0:
        found.append(shown("compress.prune.names", "compress.prune.end"))
    if current.get("config.compress.quant.aware") and current["config.compress.quant.aware_from"] > 0:
        found.append(shown("compress.quant.aware_from"))
    return found
