"""Masks of the weights with the lowest scores, for parameters that may be sharded over a mesh.

The k-th lowest score is found by bisection over its bits. Each of 32 rounds counts the scores below a bound
and sums the counts over all devices. No score is sorted or gathered, and all devices get the same result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.hashing import mix
from rec_jax.tree import leaf_names

GROUP = 4  # number of neighbouring weights in a group of "2:4"


@dataclass(frozen=True)
class Leaf:
    """A parameter to prune."""

    name: str
    index: int  # among the parameters to prune
    shape: tuple[int, ...]  # of the whole parameter, over all devices
    axes: tuple[str | None, ...]  # for each dim the mesh axis that it is sharded over


def find_leaves(params, is_matched, specs=None) -> list[Leaf]:
    """The parameters for which is_matched is True. is_matched: a tree of bools with the structure of params.
    specs: a tree of PartitionSpecs, None = no mesh."""
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
    """The tree with some leaves replaced. leaves: {name: new value}."""
    return jax.tree.unflatten(jax.tree.structure(tree), list((leaf_names(tree) | leaves).values()))


def make_chooser(config, leaves: list[Leaf], shares: np.ndarray, seed: int) -> Callable:
    """Returns choose(round, params, masks, scores) -> masks, in which a share of shares[round] of the weights
    is False.

    config: a PruneConfig. scores: a tree with the structure of params, or (). Masked weights stay masked.
    """
    groups = [leaves] if config.scope == "global" else [[leaf] for leaf in leaves]
    sizes = [sum(math.prod(leaf.shape) for leaf in group) for group in groups]
    if max(sizes) >= 2**31:
        raise ValueError(
            f"compress.prune.names={config.names!r} matches {max(sizes)} weights, but at most 2**31 - 1 "
            "can be ranked together: match fewer, or use scope='layer' (PruneConfig)"
        )

    def choose(index, params, masks, scores):
        params, old, scores = leaf_names(params), leaf_names(masks), leaf_names(scores)
        keys, kept = {}, {}
        for leaf in leaves:
            score = _score(config, leaf, params[leaf.name], scores.get(leaf.name), seed)
            score = jnp.where(old[leaf.name], score, -jnp.inf)
            keys[leaf.name] = ordered_bits(_sum_units(config, leaf, score))
        if config.structure == "2:4":
            num_pruned = jnp.asarray((shares * GROUP).astype(np.int32))[index]
            kept = {name: _is_high_in_group(name, key, num_pruned) for name, key in keys.items()}
        else:
            for group, size in zip(groups, sizes, strict=True):
                num_pruned = jnp.asarray(np.round(shares * size).astype(np.int32))[index]
                bound = kth_lowest([(keys[leaf.name], *_unit(config, leaf)) for leaf in group], num_pruned)
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
    """f32 in [0, 1), a hash of the index in the whole parameter. shape: of this device's shard."""
    index = jnp.zeros(shape, jnp.uint32)
    for dim, axis in enumerate(leaf.axes):
        first = 0 if axis is None else jax.lax.axis_index(axis).astype(jnp.uint32) * shape[dim]
        index = index * leaf.shape[dim] + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) + first
    return (mix(index, mix(leaf.index, seed)) >> 8).astype(jnp.float32) * 2.0**-24


def _summed_dims(config, leaf: Leaf) -> tuple[int, ...]:
    kept_dim = {"rows": 0, "columns": len(leaf.shape) - 1}.get(config.structure)
    return () if kept_dim is None else tuple(dim for dim in range(len(leaf.shape)) if dim != kept_dim)


def _sum_units(config, leaf: Leaf, score):
    """Scores summed over the weights of each unit (weights that are pruned together). The summed dims keep
    size 1."""
    dims = _summed_dims(config, leaf)
    return _sum_over([leaf.axes[d] for d in dims], jnp.sum(score, axis=dims, keepdims=True))


def _unit(config, leaf: Leaf) -> tuple[int, list]:
    """Returns (size, axes): the number of weights in a unit, and the mesh axes over which the units are
    sharded."""
    dims = _summed_dims(config, leaf)
    return math.prod(leaf.shape[d] for d in dims), [a for d, a in enumerate(leaf.axes) if d not in dims]


def _sum_over(axes, x):
    """The sum of x over the mesh axes; entries of `axes` that are None are ignored."""
    axes = tuple(axis for axis in axes if axis is not None)
    return jax.lax.psum(x, axes) if axes else x


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 keys that have the order of the f32 numbers `x`; -0 and 0 have the same key."""
    x = jnp.where(x == 0, 0, x)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def kth_lowest(units, num: jax.Array) -> jax.Array:
    """The lowest key such that at least `num` weights have this key or a lower one; 0 if num is 0. A uint32
    scalar.

    units: [(uint32 keys, the number of weights that each key stands for, the mesh axes over which the keys
    are sharded), ...].
    """

    def count_below(bound):
        return sum(size * _sum_over(axes, jnp.sum(k < bound, dtype=jnp.int32)) for k, size, axes in units)

    def set_bit(i, low):  # from the highest bit: keeps it if fewer than `num` are below
        trial = low | jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        return jnp.where(count_below(trial) < num, trial, low)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.uint32(0))


def _is_high_in_group(name: str, keys, num_pruned):
    """False for the `num_pruned` lowest of every 4 neighbours along dim 0; of equal keys, the first ones."""
    if keys.shape[0] % GROUP:
        raise ValueError(
            f"structure='2:4' prunes {name} in groups of {GROUP} along dim 0, but a device's shard has "
            f"{keys.shape[0]} there: change the width or the mesh, or match other names (PruneConfig)"
        )
    groups = keys.reshape(-1, GROUP, *keys.shape[1:])
    rank = jnp.argsort(jnp.argsort(groups, axis=1, stable=True), axis=1)
    return (rank >= num_pruned).reshape(keys.shape)
