"""Masks of the weights with the lowest scores, of parameters that may be sharded over a mesh.

The k-th lowest score is found by bisection over its bits. Each of 32 rounds counts what lies below a bound
and sums the counts of all devices: nothing is sorted or gathered, and every device finds the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.hashing import mix
from rec_jax.tree import leaf_names

GROUP = 4  # of weights, for "2:4"


@dataclass(frozen=True)
class Leaf:
    """A parameter to be pruned, as a whole."""

    name: str
    index: int  # among those to be pruned
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # of the mesh, that each dim is split over


def find_leaves(params, is_matched, specs=None) -> list[Leaf]:
    """Those of the params where is_matched. specs: a tree of PartitionSpecs, None = not on a mesh."""
    structure = jax.tree.structure(params)
    flat_specs = [()] * structure.num_leaves if specs is None else structure.flatten_up_to(specs)
    flags = jax.tree.leaves(is_matched)
    leaves = []
    for (name, x), is_in, spec in zip(leaf_names(params).items(), flags, flat_specs, strict=True):
        if is_in:
            axes = tuple(spec) + (None,) * (x.ndim - len(spec))
            leaves.append(Leaf(name, len(leaves), tuple(x.shape), axes))
    return leaves


def with_leaves(tree, leaves: dict):
    """The tree with the leaves of these names replaced."""
    return jax.tree.unflatten(jax.tree.structure(tree), list((leaf_names(tree) | leaves).values()))


def make_chooser(config, leaves: list[Leaf], shares: np.ndarray, seed: int) -> Callable:
    """choose(round, params, masks, scores) -> masks, of which shares[round] of the weights are False.

    config: a PruneConfig. scores: a tree as params, or (). What is masked stays so.
    """
    groups = [leaves] if config.scope == "global" else [[leaf] for leaf in leaves]
    sizes = [sum(math.prod(leaf.shape) for leaf in group) for group in groups]
    if max(sizes) >= 2**31:
        raise ValueError(
            f"compress.prune.names={config.names!r} matches {max(sizes)} weights, more than can be counted "
            "together: match fewer, or use scope='layer' (PruneConfig)"
        )

    def choose(at, params, masks, scores):
        params, old, scores = leaf_names(params), leaf_names(masks), leaf_names(scores)
        keys, kept = {}, {}
        for leaf in leaves:
            score = _score(config, leaf, params[leaf.name], scores.get(leaf.name), seed)
            score = jnp.where(old[leaf.name], score, -jnp.inf)
            keys[leaf.name] = ordered_bits(_of_units(config, leaf, score))
        if config.structure == "2:4":
            num_pruned = jnp.asarray((shares * GROUP).astype(np.int32))[at]
            kept = {name: _is_high_in_group(name, key, num_pruned) for name, key in keys.items()}
        else:
            for group, size in zip(groups, sizes, strict=True):
                wanted = jnp.asarray(np.round(shares * size).astype(np.int32))[at]
                bound = kth_lowest([(keys[leaf.name], *_unit(config, leaf)) for leaf in group], wanted)
                kept |= {leaf.name: keys[leaf.name] > bound for leaf in group}
        return with_leaves(masks, {name: old[name] & kept[name] for name in kept})

    return choose


def _score(config, leaf: Leaf, weight, accumulated, seed: int) -> jax.Array:
    if config.score == "magnitude":
        return weight**2 if config.structure in ("rows", "columns") else jnp.abs(weight)
    if config.score == "random":
        return _random(leaf, weight.shape, seed)
    return accumulated


def _random(leaf: Leaf, shape: tuple[int, ...], seed: int) -> jax.Array:
    """f32 in [0, 1) by place in the whole array. shape: of this device's part."""
    place = jnp.zeros(shape, jnp.uint32)
    for dim, axis in enumerate(leaf.axes):
        first = 0 if axis is None else jax.lax.axis_index(axis).astype(jnp.uint32) * shape[dim]
        place = place * leaf.shape[dim] + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) + first
    return (mix(place, mix(leaf.index, seed)) >> 8).astype(jnp.float32) * 2.0**-24


def _summed_dims(config, leaf: Leaf) -> tuple[int, ...]:
    kept_dim = {"rows": 0, "columns": len(leaf.shape) - 1}.get(config.structure)
    return () if kept_dim is None else tuple(dim for dim in range(len(leaf.shape)) if dim != kept_dim)


def _of_units(config, leaf: Leaf, score):
    """Sums over the weights that are pruned as one, of size 1 along the dims that these fill."""
    dims = _summed_dims(config, leaf)
    return _sum_over([leaf.axes[d] for d in dims], jnp.sum(score, axis=dims, keepdims=True))


def _unit(config, leaf: Leaf) -> tuple[int, list]:
    """(the number of weights that are pruned as one, the mesh axes over which such units are sharded)."""
    dims = _summed_dims(config, leaf)
    return math.prod(leaf.shape[d] for d in dims), [a for d, a in enumerate(leaf.axes) if d not in dims]


def _sum_over(axes, x):
    """The sum over those of the mesh axes that are not None."""
    axes = tuple(axis for axis in axes if axis is not None)
    return jax.lax.psum(x, axes) if axes else x


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 in the order of f32 `x`; -0 and 0 are the same."""
    x = jnp.where(x == 0, 0, x)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def kth_lowest(units, wanted: jax.Array) -> jax.Array:
    """The lowest key such that keys up to it count `wanted` or more, 0 if that is 0; uint32 scalar.

    units: [(uint32 keys, how much each counts, the mesh axes that they are sharded over), ...].
    """

    def count_below(bound):
        return sum(each * _sum_over(axes, jnp.sum(k < bound, dtype=jnp.int32)) for k, each, axes in units)

    def set_bit(i, low):  # from the highest: as long as fewer than wanted lie below
        trial = low | jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        return jnp.where(count_below(trial) < wanted, trial, low)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.uint32(0))


def _is_high_in_group(name: str, keys, num_pruned):
    """False for the `num_pruned` lowest of each 4 neighbours along dim 0, the first of equal ones."""
    if keys.shape[0] % GROUP:
        raise ValueError(
            f"structure='2:4' needs {name} in groups of {GROUP}, but dim 0 of a device's part is "
            f"{keys.shape[0]}: change the width or the mesh, or match other names (PruneConfig)"
        )
    groups = keys.reshape(-1, GROUP, *keys.shape[1:])
    rank = jnp.argsort(jnp.argsort(groups, axis=1, stable=True), axis=1)
    return (rank >= num_pruned).reshape(keys.shape)
