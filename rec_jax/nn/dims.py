"""Names of the dims of parameters, given where a parameter is made. What splits, shrinks or adapts parameters
reads them from `Model.dims`, {name of the parameter: its dims}.

A dim is named by a string; by a tuple, outermost first, where it packs several, of which a number counts
groups: ("heads", "head_width"), (3, "width"); or by a list of such where parts of different sizes follow each
other. None is a dim that nobody asks for.
"""

import math

import flax.nnx as nnx
import numpy as np

# Parts one after the other, each a product of (name or None, size), outermost first.
Dim = tuple[tuple[tuple[str | None, int], ...], ...]


def named(made, *dims, **sizes: int):
    """`made` with names for its dims.

    made: a parameter; or a module with a kernel (and a bias, which has the kernel's dims but the first) or an
    embedding. sizes: of the names that do not follow from the shape: all but one of each product, and all in
    a list.
    """
    if isinstance(made, nnx.Variable):
        resolved = tuple(_resolve(dim, size, sizes) for dim, size in zip(dims, made.shape, strict=True))
        made.set_metadata("dims", resolved)
    elif hasattr(made, "embedding"):
        named(made.embedding, *dims, **sizes)
    else:
        named(made.kernel, *dims, **sizes)
        if made.bias is not None:
            named(made.bias, *dims[1:], **sizes)
    return made


def dims_of(variable: nnx.Variable) -> tuple[Dim, ...]:
    """The names that `named` gave it, or none: then nothing splits or shrinks it."""
    return variable.get_metadata().get("dims") or tuple((((None, size),),) for size in variable.shape)


def _resolve(dim, size: int, sizes: dict[str, int]) -> Dim:
    parts = []
    for part in dim if isinstance(dim, list) else [dim]:
        names = part if isinstance(part, tuple) else (part,)
        known = [name if isinstance(name, int) else sizes.get(name) for name in names]
        if None in known:
            known[known.index(None)] = size // math.prod(x for x in known if x is not None)
        names = [None if isinstance(name, int) else name for name in names]
        parts.append(tuple(zip(names, known, strict=True)))
    assert sum(math.prod(n for _, n in part) for part in parts) == size, (dim, size, sizes)
    return tuple(parts)


def sizes_of(dim: Dim) -> dict[str, int]:
    """{name: size} of all that a dim packs."""
    return {name: size for part in dim for name, size in part if name}


def outermost(dim: Dim) -> tuple[str | None, int]:
    """(name, size) of what a dim consists of in contiguous pieces of equal size."""
    return dim[0][0] if len(dim) == 1 else (None, 1)


def is_stacked(dims: tuple[Dim, ...]) -> bool:
    """Is a parameter one for each of several experts?"""
    return outermost(dims[0])[0] == "experts"


def places(dim: Dim, kept: dict[str, np.ndarray]) -> np.ndarray:
    """bool[size of the dim]: the places of the units that are kept. kept: {name: bool[units]}."""
    masks = []
    for part in dim:
        mask = np.ones(1, bool)
        for name, size in part:
            mask = np.logical_and.outer(mask, kept.get(name, np.ones(size, bool))).reshape(-1)
        masks.append(mask)
    return np.concatenate(masks)
