"""Settings that may change between two sessions of a run: those that do not affect what a step computes."""

import json
import pathlib

from flax.traverse_util import flatten_dict

# Settings that only determine when a run stops, what it writes and how its work is divided. Another mesh
# changes results by rounding only.
_FREE = (
    "config.data.path",  # the split and the vocabulary are compared directly
    "config.train.epochs",  # only if no setting is relative to the length of the training
    "config.train.patience",
    "config.train.checkpoint_every_steps",
    "config.train.log_every_steps",
    "config.train.keep_checkpoints",
    "config.train.micro_rows",
    "config.table.capacity_factor",
    "config.mesh.data",
    "config.mesh.model",
    "config.mesh.fully_sharded",
    # Without filter_seen and max_examples, which define the validation metric that selects the best step.
    "config.eval.ks",
    "config.eval.bootstrap",
    "config.eval.sampled_negatives",
    "config.eval.baselines",
    "config.eval.batch_bytes",
)


def plain_json(tree: dict) -> dict:
    """Returns `tree` as it is after a JSON round trip: lists for tuples, numbers for NumPy scalars."""
    return json.loads(json.dumps(tree, default=lambda value: value.item()))


def _flat(tree: dict) -> dict:
    return flatten_dict(plain_json(tree), sep=".")


def changes(saved: dict, current: dict) -> dict[str, str]:
    """Returns the keys whose values differ: {"config.train.epochs": "saved 3, now 4"}."""
    saved, current = _flat(saved), _flat(current)
    return {
        key: f"saved {saved.get(key, 'nothing')}, now {current.get(key, 'nothing')}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    }


def check_same_run(saved: dict, current: dict, path: pathlib.Path, *, is_finished: bool) -> None:
    """Raises ValueError, which names the keys, if the run in `path` must not resume with these settings.

    The keys in `_FREE` may change at any time, except that train.epochs may not change if another setting is
    relative to it. Once the run is finished, with nothing left to train or evaluate, all of `eval` may
    change. Before that, the keys that define the validation metric may not change: values of different
    metrics cannot be compared to select the best step.
    """
    different = changes(saved, current)
    wrong = [
        f"{key} ({values})"
        for key, values in different.items()
        if key not in _FREE and not (is_finished and key.startswith("config.eval."))
    ]
    if wrong:
        raise ValueError(
            f"the run saved in {path} has other settings: {'; '.join(wrong)}. Use a new workdir for the "
            "changed run, or the saved values to resume this one"
        )
    relative = _relative_to_length(_flat(current))
    if "config.train.epochs" in different and relative:
        raise ValueError(
            f"train.epochs ({different['config.train.epochs']}): the length of the run saved in {path} "
            f"cannot change, because {', '.join(relative)} depends on the completed share of the training, "
            "which would jump. Resume it with the saved train.epochs, or train for another length in a new "
            "workdir. A run can be extended if it has optim.schedule='constant', no pruning, and no "
            "quantization-aware training or one that starts at the first step"
        )


def _relative_to_length(current: dict) -> list[str]:
    """Returns the settings that depend on train.epochs. If it changed in the middle of a run, the learning
    rate, the share of pruned weights or the quantization would jump."""

    def shown(*keys) -> str:
        return " ".join(f"{key}={current[f'config.{key}']!r}" for key in keys)

    settings = []
    if current.get("config.optim.schedule", "constant") != "constant":
        settings.append(shown("optim.schedule"))
    if current.get("config.compress.prune.names") and current["config.compress.prune.end"] > 0:
        settings.append(shown("compress.prune.names", "compress.prune.end"))
    if current.get("config.compress.quant.aware") and current["config.compress.quant.aware_from"] > 0:
        settings.append(shown("compress.quant.aware_from"))
    return settings
