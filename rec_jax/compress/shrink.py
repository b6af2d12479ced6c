"""Structured pruning: removes heads, feed-forward channels, dims and layers; the result is a smaller model.

    units = choose_units(model, params, ShrinkConfig(heads=2, width=48))
    small_config, small_params = shrink(model, params, units)
    mask(params, unit_masks(model, params, units))      the full-size model that computes the same

The names of dims (`nn.dims`) define which weights belong to a unit: "heads" and "ff_width" of each block,
"width" of the whole model.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np

from rec_jax.models.base import Model, SequenceConfig
from rec_jax.nn.dims import kept_mask, sizes_of
from rec_jax.tree import leaf_names

# {field of ShrinkConfig: field of the model's config}
_FIELDS = {"heads": "num_heads", "ff_width": "ff_width", "width": "width", "num_layers": "num_layers"}


@dataclass(frozen=True)
class ShrinkConfig:
    """The number of units that a shrunk model keeps; 0 = all.

    heads, ff_width: per layer; each layer chooses its own. width: the same dims in the whole model.
    score: which units are kept. "magnitude": those with the largest weights; "taylor": those whose removal
    changes the loss most, to first order; "random": a control.
    """

    heads: int = 0
    ff_width: int = 0
    width: int = 0
    num_layers: int = 0
    score: Literal["magnitude", "taylor", "random"] = "magnitude"

    def __post_init__(self):
        for name in _FIELDS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 (ShrinkConfig)")


class Units(NamedTuple):
    """Whether each unit is kept, as bools in the order of ShrinkConfig. L: the number of blocks, 1 if layers
    share their block. If a model has no units of a kind, the array is empty."""

    heads_LN: np.ndarray
    ff_width_LF: np.ndarray
    width_D: np.ndarray
    layers_L: np.ndarray


def unit_scores(
    model: Model, params, score: str = "magnitude", grads=None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns the importance of every unit: {"heads": [L, N], "ff_width": [L, F], "width": [D],
    "num_layers": [L]}.

    "magnitude" is the l2 norm of all weights that write to the unit or read from it; for "width" these are
    mostly weights of the item embedding table. "taylor" is |sum of weight * gradient| and needs grads, the
    gradients of the loss, with the structure of params.

    Source: Molchanov et al., CVPR'19 (arXiv 1906.10771), eq. 8, for taylor. Differs: not squared.
    """
    num_blocks, units = len(params.get("blocks", ())), num_units(model)
    sizes = {
        "heads": (num_blocks, units.get("heads", 0)),
        "ff_width": (num_blocks, units.get("ff_width", 0)),
        "width": (model.config.width,),
        "num_layers": (num_blocks,),
    }
    if score == "random":
        rng = np.random.default_rng(seed)
        return {unit: rng.random(size) for unit, size in sizes.items()}
    if score == "taylor" and grads is None:
        raise ValueError(
            "score='taylor' needs gradients of the loss: pass grads, or use score='magnitude' (ShrinkConfig)"
        )
    scores = {unit: np.zeros(size) for unit, size in sizes.items()}
    grads = leaf_names(grads if score == "taylor" else params)
    for name, x in leaf_names(params).items():
        values = np.asarray(x, np.float64) * np.asarray(grads[name], np.float64)
        block = _block_of(name)
        if block is not None:
            scores["num_layers"][block] += values.sum()
        for axis, dim in enumerate(model.dims[name]):
            for unit, size in sizes_of(dim).items():
                if unit in ("heads", "ff_width", "width"):
                    totals = scores[unit] if unit == "width" else scores[unit][block]
                    sums = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1).sum(1)
                    for index in range(size):
                        totals[index] += sums[kept_mask(dim, {unit: np.arange(size) == index})].sum()
    return {unit: np.abs(total) ** (0.5 if score == "magnitude" else 1) for unit, total in scores.items()}


def choose_units(model: Model, params, config: ShrinkConfig, grads=None, seed: int = 0) -> Units:
    """The units with the highest scores; of equal scores, the first ones. grads: see `unit_scores`.

    Raises ValueError if the config keeps more units than the model has, or removes units that cannot be
    removed.
    """
    check(model, config)
    scores = unit_scores(model, params, config.score, grads, seed)
    return Units(*(_highest(scores[unit], getattr(config, unit)) for unit in _FIELDS))


def num_units(model: Model) -> dict[str, int]:
    """Returns {kind of unit: the number of such units in the model}."""
    units = {"num_layers": model.config.num_layers}
    for dims in model.dims.values():
        for dim in dims:
            units |= sizes_of(dim)
    return units


def check(model: Model, config: ShrinkConfig) -> None:
    """Raises ValueError if the config keeps more units than the model has, or removes units that cannot be
    removed."""
    units, kind = num_units(model), model.config.type
    for name in _FIELDS:
        if (num_kept := getattr(config, name)) == 0:
            continue
        if name not in units:
            raise ValueError(
                f"{name}={num_kept}: a model of type={kind!r} has no such units; leave it at 0 (ShrinkConfig)"
            )
        if num_kept > units[name]:
            raise ValueError(
                f"{name}={num_kept} must be at most the model's {_FIELDS[name]}={units[name]} (ShrinkConfig)"
            )
    if (config.heads or config.width) and "heads" in units and not hasattr(model.config, "head_width"):
        raise ValueError(
            f"heads={config.heads}, width={config.width}: a model of type={kind!r} has heads of width / "
            "num_heads dims, so neither can shrink alone: shrink ff_width or num_layers, or distil a student "
            "(ShrinkConfig)"
        )
    reason = model.config.fixed_layers
    if reason and config.num_layers not in (0, model.config.num_layers):
        raise ValueError(
            f"num_layers={config.num_layers}: {reason}, so no layer can be removed from a model of "
            f"type={kind!r}; distil a student with fewer layers (ShrinkConfig)"
        )


def _highest(scores, num: int):
    """A bool array of the shape of scores: True for the `num` highest along the last axis; num 0 = all."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, order[..., : num or None], True, axis=-1)
    return kept


def unit_masks(model: Model, params, units: Units):
    """A tree of bool arrays with the shapes of params, False for the weights of removed units.

    The output of a masked head or channel is 0, a masked layer adds nothing to the residual stream, and a
    masked dim of the stream is 0 everywhere.
    """

    def mask_of(name, x):
        kept = np.ones(x.shape, bool)
        for axis, kept_X in enumerate(_kept(name, model, units)):
            kept &= np.expand_dims(kept_X, [other for other in range(x.ndim) if other != axis])
        block = _block_of(name)
        return kept if block is None else kept & units.layers_L[block]

    masks = [mask_of(name, x) for name, x in leaf_names(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), masks)


def mask(params, masks):
    """The parameters with masked weights set to 0. masks: a tree of bool arrays, False = masked."""
    return jax.tree.map(lambda x, kept: x * kept.astype(x.dtype), params, masks)


def shrink(model: Model, params, units: Units) -> tuple[SequenceConfig, dict]:
    """Returns (config, params) of the model without the removed units; its outputs are those of the masked
    model."""

    def cut(name, x):
        for axis, kept_X in enumerate(_kept(name, model, units)):
            x = x.take(np.flatnonzero(kept_X), axis)
        return x

    leaves = [cut(name, x) for name, x in leaf_names(params).items()]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    if "blocks" in params:
        kept = np.flatnonzero(units.layers_L)
        params = {**params, "blocks": {new: params["blocks"][old] for new, old in enumerate(kept.tolist())}}
    kept = ShrinkConfig(
        heads=_num_kept(units.heads_LN),
        ff_width=_num_kept(units.ff_width_LF),
        width=_num_kept(units.width_D[None]),
        num_layers=_num_kept(units.layers_L[None]),
    )
    return shrunk_config(model.config, kept), params


def shrunk_config(config: SequenceConfig, kept: ShrinkConfig) -> SequenceConfig:
    """The config of a model that keeps only these units. kept: must pass `check`."""
    sizes = {field: getattr(kept, name) for name, field in _FIELDS.items() if getattr(kept, name)}
    if kept.width:
        sizes["full_width"] = config.full_width or config.width
    if hasattr(config, "head_width"):
        sizes["head_width"] = config.head_width or config.width // config.num_heads
    if kept.heads and hasattr(config, "full_heads"):
        sizes["full_heads"] = config.full_heads or config.num_heads
    return dataclasses.replace(config, **{name: x for name, x in sizes.items() if hasattr(config, name)})


def _num_kept(kept_LX) -> int:
    """The number of units kept per layer, which is the same in every layer; 0 = all."""
    if kept_LX.all():
        return 0
    (count,) = set(kept_LX.sum(1).tolist())
    return count


def _block_of(name: str) -> int | None:
    match = re.match(r"blocks/(\d+)/", name)
    return int(match[1]) if match else None


def _kept(name: str, model: Model, units: Units) -> list[np.ndarray]:
    """For each dim of a parameter, a bool array: which of its indices are kept."""
    kept, block = {"width": units.width_D}, _block_of(name)
    if block is not None:
        kept |= {"heads": units.heads_LN[block], "ff_width": units.ff_width_LF[block]}
    return [kept_mask(dim, kept) for dim in model.dims[name]]
