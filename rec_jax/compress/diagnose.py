"""Diagnostic tables of a model's weights: each function returns (head, rows) of strings for `print_table`."""

from collections.abc import Callable

import jax
import numpy as np

from rec_jax.compress.lowest import with_leaves
from rec_jax.tree import leaf_mask, leaf_names

QUANTILES = (0.01, 0.5, 0.99)


def weight_table(params, grads=None) -> tuple[tuple, list[tuple]]:
    """One row per parameter: shape, share of zeros, l2 norm, largest |w|.

    grads: a tree with the structure of params; adds the l2 norm of each gradient and quantiles of |g|.
    """
    head = ("parameter", "shape", "zeros", "norm", "max |w|")
    if grads is not None:
        head += ("norm of g", *(f"|g| {q:.0%}" for q in QUANTILES))
    gradients = {} if grads is None else leaf_names(grads)
    rows = []
    for name, x in leaf_names(params).items():
        w = np.asarray(x, np.float32)
        row = (
            name,
            "x".join(map(str, w.shape)),
            f"{np.mean(w == 0):.1%}",
            *_format(_norm(w), np.abs(w).max()),
        )
        if name in gradients:
            g = np.asarray(gradients[name], np.float32)
            row += _format(_norm(g), *np.quantile(np.abs(g), QUANTILES))
        rows.append(row)
    return head, rows


def _norm(x):
    return np.sqrt(np.sum(x**2, dtype=np.float64))


def _format(*numbers) -> tuple[str, ...]:
    return tuple(f"{number:.3g}" for number in numbers)


def sensitivity(
    params, names: str, shares: tuple[float, ...], evaluate: Callable
) -> tuple[tuple, list[tuple]]:
    """The values of `evaluate(params) -> float` when one parameter at a time is pruned, by magnitude, in one
    step and without training.

    names: regex over parameter names. shares: the shares of a parameter's weights that are set to 0, one
    column each, after a column for the unpruned model.
    Source: Li et al., arXiv 1608.08710, section 3.2. Differs: single weights instead of whole filters.

    Raises ValueError, listing the names, if none matches.
    """
    matched = leaf_names(leaf_mask(params, names, field="names"))
    head = ("parameter", "0%", *(f"{share:.0%}" for share in shares))
    unpruned = evaluate(params)
    rows = []
    for name, w in leaf_names(params).items():
        if matched[name]:
            pruned = [evaluate(with_leaves(params, {name: _prune_lowest(w, share)})) for share in shares]
            rows.append((name, *(f"{value:.4f}" for value in (unpruned, *pruned))))
    return head, rows


def _prune_lowest(w: jax.Array, share: float) -> jax.Array:
    pruned = np.array(w)
    lowest = np.argsort(np.abs(pruned), axis=None, kind="stable")[: round(share * pruned.size)]
    pruned.flat[lowest] = 0
    return jax.device_put(pruned, w.sharding)
