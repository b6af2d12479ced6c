"""Parameters sharded over a mesh: by heads, channels and experts over "model" (tensor parallelism), and fully
over "data" (FSDP).

All functions except `split_dims` and `partition` run inside a shard_map over both axes.

Source: Shoeybi et al., arXiv 1909.08053, for the pair of functions around a split block; Rajbhandari et al.,
SC'20 (arXiv 1910.02054), for parameters of which each device keeps a part.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rec_jax.nn.dense import dense
from rec_jax.nn.dims import outermost, sizes_of
from rec_jax.tree import leaf_names


@jax.custom_vjp
def to_parts(x):
    """Enters a block whose parameters are split over "model": returns x; the backward pass sums the gradients
    of the parts."""
    return x


to_parts.defvjp(lambda x: (x, None), lambda _, grad: (jax.lax.psum(grad, "model"),))


@jax.custom_vjp
def sum_parts(x):
    """Leaves such a block: returns the sum of the parts; the backward pass gives each part its gradient."""
    return jax.lax.psum(x, "model")


sum_parts.defvjp(lambda x: (jax.lax.psum(x, "model"), None), lambda _, grad: (grad,))


def join(linear, x_TF, is_split: bool):
    """Applies the last dense layer of a block. If is_split, a device has a part of x_TF and the kernel."""
    if not is_split:
        return linear(x_TF)
    return sum_parts(dense(x_TF, linear.kernel[...])) + linear.bias[...]


_SPLIT = ("heads", "ff_width", "experts")  # the dims that blocks can split over "model"


def split_dims(dims: dict[str, tuple], parts: int) -> dict[str, int]:
    """Returns {parameter name: index of the dim that is split over "model"}.

    Heads, channels and experts of a block are split if `parts` divides their number and they are the
    outermost factor of a dim in every parameter of the block; otherwise they are replicated.
    """
    splits, unsplit = [], set()
    for name, param_dims in dims.items():
        block = name.split("/")[:2]
        for index, dim in enumerate(param_dims):
            for unit in sizes_of(dim):
                outer, size = outermost(dim)
                if outer == unit and size % parts == 0:
                    splits.append((name, index, (*block, unit)))
                else:
                    unsplit.add((*block, unit))
    return {
        name: index
        for name, index, unit in splits
        if parts > 1 and unit[-1] in _SPLIT and unit not in unsplit
    }


def partition(params, dims: dict[str, tuple], mesh: Mesh, *, fully_sharded: bool):
    """Returns a tree of PartitionSpecs.

    dims: see `nn.dims`; parameters without names are replicated over "model". fully_sharded: shard parameters
    also over "data", along their largest unsharded dim that the size of "data" divides.
    """
    split = split_dims(dims, mesh.shape["model"])

    def spec_of(name: str, x) -> P:
        axes = ["model" if split.get(name) == d else None for d in range(x.ndim)]
        size = mesh.shape["data"]
        candidates = [d for d in range(x.ndim) if axes[d] is None and x.shape[d] % size == 0]
        if fully_sharded and candidates and size > 1:
            axes[max(candidates, key=lambda d: x.shape[d])] = "data"
        return P(*axes)

    names = leaf_names(params)
    return jax.tree.unflatten(jax.tree.structure(params), [spec_of(*item) for item in names.items()])


def gather(params, specs):
    """Returns parameters gathered over "data"."""

    def gathered(x, spec):
        if "data" not in spec:
            return x
        return jax.lax.all_gather(x, "data", axis=tuple(spec).index("data"), tiled=True)

    return jax.tree.map(gathered, params, specs)


def reduce(grads, specs, dtype=jnp.float32):
    """Returns gradients summed over "data"; each device gets the sum for its own part of a sharded parameter.
    dtype: the type in which they are sent and summed."""

    def total(grad, spec):
        grad = grad.astype(dtype)
        if "data" in spec:
            dim = tuple(spec).index("data")
            grad = jax.lax.psum_scatter(grad, "data", scatter_dimension=dim, tiled=True)
        elif jax.lax.axis_size("data") > 1:  # a psum over one device would still copy
            grad = jax.lax.psum(grad, "data")
        return grad.astype(jnp.float32)

    return jax.tree.map(total, grads, specs)


def sum_squares(grads, specs) -> jax.Array:
    """The sum of squared gradients over all elements and devices, each element counted once."""

    def squares(grad, spec):
        axes = tuple(axis for axis in spec if axis is not None)
        total = jnp.sum(grad**2)
        return jax.lax.psum(total, axes) if axes else total

    return sum(jax.tree.leaves(jax.tree.map(squares, grads, specs)))
