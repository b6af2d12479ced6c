"""Names for the dims of parameters, given where a parameter is created. Code that splits, shrinks or adapts
parameters reads them from `Model.dims`, {parameter name: its dims}.

A dim is named by a string. A dim that packs several factors is named by a tuple, outermost first, in which a
number is a number of groups: ("heads", "head_width"), (3, "width"). A dim that concatenates parts of
different sizes is named by a list of these. None is a dim without a name.
"""

import math

import flax.nnx as nnx
import numpy as np

# Concatenated parts. Each part is a product of factors (name or None, size), outermost first.
Dim = tuple[tuple[tuple[str | None, int], ...], ...]


def named(made, *dims, **sizes: int):
    """Returns `made` after naming its dims.

    made: a parameter; or a module with an embedding, or with a kernel and maybe a bias, which has all dims of
    the kernel except the first. sizes: the sizes that do not follow from the shape: of all names except one
    in a tuple, and of all names in a list.
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
    """Returns the dims set by `named`. Without it they have no names, so nothing splits or shrinks them."""
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
    """Returns {name: size} for all named factors of a dim."""
    return {name: size for part in dim for name, size in part if name}


def outermost(dim: Dim) -> tuple[str | None, int]:
    """Returns (name, size) of the outermost factor, whose units are contiguous and of equal size. (None, 1)
    if the dim concatenates parts."""
    return dim[0][0] if len(dim) == 1 else (None, 1)


def is_stacked(dims: tuple[Dim, ...]) -> bool:
    """Whether a parameter stacks one array for each expert."""
    return outermost(dims[0])[0] == "experts"


def kept_mask(dim: Dim, kept: dict[str, np.ndarray]) -> np.ndarray:
    """bool[size of the dim]: the elements that belong to kept units. kept: {name: bool[units]}."""
    masks = []
    for part in dim:
        mask = np.ones(1, bool)
        for name, size in part:
            mask = np.logical_and.outer(mask, kept.get(name, np.ones(size, bool))).reshape(-1)
        masks.append(mask)
    return np.concatenate(masks)
