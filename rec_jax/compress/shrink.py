"""Structured pruning: heads, feed-forward channels, dims and layers are removed, and a smaller dense model is
left.

    units = choose_units(model_config, params, ShrinkConfig(heads=2, width=48))
    small_config, small_params = shrink(model_config, params, units)
    mask(params, unit_masks(params, units))             the full model that computes the same
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np

from rec_jax.models.sasrec import SASRecConfig
from rec_jax.tree import leaf_names

# What the axes of a parameter count: "width" (dims of the residual stream), "heads", "ff_width", or neither.
_AXES = {
    r"(items|positions)/embedding|project/kernel": (None, "width"),
    r".*norm/(scale|bias)|.*(out|down)/bias": ("width",),
    r".*query/kernel": ("width", "heads"),
    r".*query/bias": ("heads",),
    r".*key_value/kernel": ("width", None, "heads"),
    r".*key_value/bias": (None, "heads"),
    r".*out/kernel": ("heads", "width"),
    r".*up/kernel": ("width", "ff_width"),
    r".*up/bias": ("ff_width",),
    r".*down/kernel": ("ff_width", "width"),
}

# Fields of ShrinkConfig: {how many are left: what the model's config calls it}.
_FIELDS = {"heads": "num_heads", "ff_width": "ff_width", "width": "width", "num_layers": "num_layers"}


@dataclass(frozen=True)
class ShrinkConfig:
    """What is left of a model; 0 = all.

    heads, ff_width: of every layer, chosen in each by itself. width: the same dims all through the model.
    score: which units stay. "magnitude": those of the largest weights; "taylor": those whose removal changes
    the loss most, in first order; "random": any, to compare with.
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
    """Is the unit kept? L counts blocks: one where layers share theirs. In the order of ShrinkConfig."""

    heads_LN: np.ndarray
    ff_width_LF: np.ndarray
    width_D: np.ndarray
    layers_L: np.ndarray


def unit_scores(
    model_config: SASRecConfig, params, score: str = "magnitude", grads=None, seed: int = 0
) -> dict[str, np.ndarray]:
    """The importance of every unit: {"heads": [L, N], "ff_width": [L, F], "width": [D], "num_layers": [L]}.

    "magnitude" is the l2 norm of all weights that write to the unit or read from it; for dims these are
    mostly those of the table. "taylor" is |sum of weight * gradient|; grads: of the loss, like params.

    Source: Molchanov et al., CVPR'19 (arXiv 1906.10771), eq. 8, for taylor, here without the square.
    """
    num_blocks, heads = len(params.get("blocks", ())), model_config.num_heads
    sizes = {
        "heads": (num_blocks, heads),
        "ff_width": (num_blocks, model_config.ff_width),
        "width": (model_config.width,),
        "num_layers": (num_blocks,),
    }
    if score == "random":
        rng = np.random.default_rng(seed)
        return {unit: rng.random(size) for unit, size in sizes.items()}
    if score == "taylor" and grads is None:
        raise ValueError("score='taylor' needs grads, gradients of the loss: use magnitude (ShrinkConfig)")
    scores = {unit: np.zeros(size) for unit, size in sizes.items()}
    grads = leaf_names(grads if score == "taylor" else params)
    for name, x in leaf_names(params).items():
        values = np.asarray(x, np.float64) * np.asarray(grads[name], np.float64)
        block = _block_of(name)
        if block is not None:
            scores["num_layers"][block] += values.sum()
        for axis, unit in enumerate(_axes_of(name, params)):
            if unit is None:
                continue
            totals = scores[unit] if unit == "width" else scores[unit][block]
            totals += np.moveaxis(values, axis, 0).reshape(len(totals), -1).sum(1)  # in place
    return {unit: np.abs(total) ** (0.5 if score == "magnitude" else 1) for unit, total in scores.items()}


def choose_units(
    model_config: SASRecConfig, params, config: ShrinkConfig, grads=None, seed: int = 0
) -> Units:
    """The units of the highest scores; the first of equals. grads: see `unit_scores`.

    Raises ValueError where the config asks for more than there is, or for layers that cannot be removed.
    """
    _check(model_config, config)
    scores = unit_scores(model_config, params, config.score, grads, seed)
    return Units(*(_highest(scores[unit], getattr(config, unit)) for unit in _FIELDS))


def _check(model_config: SASRecConfig, config: ShrinkConfig):
    if model_config.num_future > 1:
        raise ValueError(f"num_future={model_config.num_future}: its heads cannot shrink (SequenceConfig)")
    for name, field in _FIELDS.items():
        left, there = getattr(config, name), getattr(model_config, field)
        if left > there:
            raise ValueError(f"{name}={left} must be at most the model's {field}={there} (ShrinkConfig)")
    if config.num_layers in (0, model_config.num_layers):
        return
    if model_config.share_layers:
        raise ValueError(
            f"num_layers={config.num_layers}: shared layers are one block, of which none can be removed; "
            "distil a student with fewer (ShrinkConfig)"
        )
    if model_config.norm != "pre":
        raise ValueError(
            f"num_layers={config.num_layers} needs a model of norm='pre': under norm={model_config.norm!r} a "
            "layer normalises what passes it by, so that none can be left out; distil a student with fewer "
            "layers (ShrinkConfig)"
        )


def _highest(scores, num: int):
    """bool like scores: the `num` highest along the last axis; 0 = all."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, order[..., : num or None], True, axis=-1)
    return kept


def unit_masks(params, units: Units):
    """A tree of bools like params, False for the weights of removed units.

    A masked head or channel gives 0, a masked layer (of norm="pre") adds nothing to the residual stream, and
    a masked dim of the stream is 0 everywhere.
    """

    def mask_of(name, x):
        kept = np.ones(x.shape, bool)
        for axis, kept_X in _kept(name, params, x, units):
            kept &= np.expand_dims(kept_X, [other for other in range(x.ndim) if other != axis])
        block = _block_of(name)
        return kept if block is None else kept & units.layers_L[block]

    masks = [mask_of(name, x) for name, x in leaf_names(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), masks)


def mask(params, masks):
    """The parameters with zeros for what is masked."""
    return jax.tree.map(lambda x, kept: x * kept.astype(x.dtype), params, masks)


def shrink(model_config: SASRecConfig, params, units: Units) -> tuple[SASRecConfig, dict]:
    """(config, params) of the model without the removed units: it gives what the masked model gives."""

    def cut(name, x):
        for axis, kept_X in _kept(name, params, x, units):
            x = x.take(np.flatnonzero(kept_X), axis)
        return x

    leaves = [cut(name, x) for name, x in leaf_names(params).items()]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    if "blocks" in params:
        left = np.flatnonzero(units.layers_L)
        params = {**params, "blocks": {new: params["blocks"][old] for new, old in enumerate(left.tolist())}}
    config = ShrinkConfig(
        heads=_per_layer(units.heads_LN),
        ff_width=_per_layer(units.ff_width_LF),
        width=int(units.width_D.sum()),
        num_layers=0 if model_config.share_layers else int(units.layers_L.sum()),
    )
    return shrunk_config(model_config, config), params


def shrunk_config(model_config: SASRecConfig, config: ShrinkConfig) -> SASRecConfig:
    """The config of a model shrunk so far."""
    _check(model_config, config)
    left = {field: getattr(config, name) or getattr(model_config, field) for name, field in _FIELDS.items()}
    full_width = model_config.full_width or model_config.width
    return dataclasses.replace(
        model_config, **left, head_width=_head_width(model_config), full_width=full_width
    )


def multiply_adds(config: SASRecConfig, num_items: int, num_tokens: int) -> int:
    """Of encoding one history of num_tokens for its next item and scoring the catalogue.

    Attention is causal, and the last layer's feed-forward is for the last token only. Products of matrices
    count, what is done element by element does not.
    """
    inner = config.num_heads * _head_width(config)
    pairs = num_tokens * (num_tokens + 1) // 2
    attention = 4 * num_tokens * config.width * inner + 2 * pairs * inner
    feed_forwards = 1 + (config.num_layers - 1) * num_tokens if config.num_layers else 0
    projections = (num_tokens + 1) * config.item_dim * config.width
    return (
        config.num_layers * attention
        + feed_forwards * 2 * config.width * config.ff_width
        + projections
        + num_items * (config.item_dim or config.width)
    )


def _head_width(config: SASRecConfig) -> int:
    return config.head_width or config.width // config.num_heads


def _per_layer(kept_LX) -> int:
    """The number kept, the same in every layer; 0 where there is none."""
    counts = set(kept_LX.sum(1).tolist())
    assert len(counts) <= 1, counts
    return counts.pop() if counts else 0


def _block_of(name: str) -> int | None:
    found = re.match(r"blocks/(\d+)/", name)
    return int(found[1]) if found else None


def _axes_of(name: str, params) -> tuple:
    if name == "items/embedding" and "project" in params:
        return None, None
    (axes,) = [axes for pattern, axes in _AXES.items() if re.fullmatch(pattern, name)]
    return axes


def _kept(name: str, params, x, units: Units):
    """(axis, bool over its places) of each axis of a parameter that counts units."""
    for axis, unit in enumerate(_axes_of(name, params)):
        if unit == "width":
            yield axis, units.width_D
        elif unit is not None:
            kept_X = (units.heads_LN if unit == "heads" else units.ff_width_LF)[_block_of(name)]
            yield axis, np.repeat(kept_X, x.shape[axis] // len(kept_X))
