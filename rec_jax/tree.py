"""Leaves of nested parameter dicts, by name."""

import re

import jax
import jax.numpy as jnp


def leaf_names(tree) -> dict[str, jax.Array]:
    """Returns {"blocks/0/ff/up/kernel": leaf, ...} in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_mask(tree, pattern: str, *, field: str):
    """Returns a tree of bools: whether the whole name of each leaf matches the regex.

    Raises ValueError, naming `field` and listing all names, if none matches.
    """
    mask = jax.tree_util.tree_map_with_path(lambda p, _: bool(re.fullmatch(pattern, _name(p))), tree)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(f"{field}={pattern!r} matches no parameter: choose from {list(leaf_names(tree))}")
    return mask


def cast_floats(tree, dtype):
    """Casts floating-point leaves to `dtype` and leaves the others unchanged."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def num_params(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def pop_leaf(tree: dict, name: str) -> tuple[dict, object]:
    """Returns (the nested dict without the leaf, the leaf). name: such as "items/embedding"."""
    first, _, rest = name.partition("/")
    if not rest:
        return {key: value for key, value in tree.items() if key != first}, tree[first]
    child, leaf = pop_leaf(tree[first], rest)
    return {**tree, first: child}, leaf


def with_leaf(tree: dict, name: str, leaf) -> dict:
    """Returns the nested dict with `leaf` in place of the leaf of that name."""
    first, _, rest = name.partition("/")
    return {**tree, first: with_leaf(tree[first], rest, leaf) if rest else leaf}
