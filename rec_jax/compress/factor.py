"""Low-rank matrices: factorised item tables, students initialised from their teacher, LoRA adapters."""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.models.base import SequenceConfig
from rec_jax.nn.dims import is_stacked
from rec_jax.tree import leaf_mask, leaf_names, with_leaf

_ITEMS = "items/embedding"


def factorise(table_VD, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (table_VE, projection_ED): their product is the best approximation of rank E = `dim` of the
    table, by squared error.

    The rows of the projection are orthonormal. Raises ValueError if dim is not from 1 to D.
    Source: Eckart & Young, Psychometrika 1936.
    """
    table_VD = np.asarray(table_VD)
    basis_DE = _main_directions(table_VD, dim, "item_dim")
    return table_VD @ basis_DE, basis_DE.T


def _main_directions(table_VD, num: int, field: str) -> np.ndarray:
    """The first `num` right singular vectors, as orthonormal columns [D, num]."""
    width = table_VD.shape[1]
    if not 1 <= num <= width:
        raise ValueError(
            f"{field}={num} must be from 1 to {width}, the number of dims of the item embedding table "
            "(SequenceConfig)"
        )
    table_VD = table_VD.astype(np.float64)
    _, vectors_DD = np.linalg.eigh(table_VD.T @ table_VD)  # D x D, whatever the number of entries
    return np.ascontiguousarray(vectors_DD[:, ::-1][:, :num], np.float32)


def factorise_model(config: SequenceConfig, params, dim: int) -> tuple[SequenceConfig, dict]:
    """Returns (config, params) of the model with its item embedding table factorised to item_dim = dim."""
    if config.item_dim:
        raise ValueError(
            f"item_dim={config.item_dim}: the item embedding table is factorised already; start from the "
            "model before its factorisation (SequenceConfig)"
        )
    if config.num_future > 1:
        raise ValueError(
            f"num_future={config.num_future}: multi-token heads cannot be factorised; use a model with "
            "num_future=1 (SequenceConfig)"
        )
    config = dataclasses.replace(config, item_dim=dim)
    table_VE, projection_ED = factorise(params["items"]["embedding"], dim)
    return config, with_leaf(params, _ITEMS, table_VE) | {"project": {"kernel": projection_ED}}


def student_from(config: SequenceConfig, params, student_config: SequenceConfig, student) -> dict:
    """A student's initial parameters: its item and position embeddings are those of the teacher, projected
    on the main directions (right singular vectors) of the teacher's item table.

    config, params: the teacher's. student: freshly initialised parameters; only the item and position
    embeddings are replaced. No other projection to as few dims keeps inner products between items better.
    The final norm gives outputs a length of about sqrt(width), so a narrower student has shorter outputs.
    Its item embeddings are scaled up by the same factor, which keeps the size of the scores.

    Raises ValueError for a student that is wider or has another number of items.
    """
    table_VD = np.asarray(params["items"]["embedding"])
    if getattr(config, "item_dim", 0):
        table_VD = table_VD @ np.asarray(params["project"]["kernel"])
    if (num_entries := len(student["items"]["embedding"])) != len(table_VD):
        raise ValueError(
            f"the student has {num_entries - 1} items, the teacher {len(table_VD) - 1}: use the teacher's "
            "data.* for the student"
        )
    width = student_config.width
    if width == config.width:
        basis_DW = np.eye(width, dtype=np.float32)  # nothing to project
    else:
        basis_DW = _main_directions(table_VD, width, "width")
    growth = ((config.full_width or config.width) / (student_config.full_width or width)) ** 0.5
    items_VW = growth * table_VD @ basis_DW
    if getattr(student_config, "item_dim", 0):
        table_VE, projection_EW = factorise(items_VW, student_config.item_dim)
        student = with_leaf(student, _ITEMS, table_VE) | {"project": {"kernel": projection_EW}}
    else:
        student = with_leaf(student, _ITEMS, items_VW)
    if "positions" in student and "positions" in params:
        positions_SW = np.array(student["positions"]["embedding"])
        num = min(len(positions_SW), len(params["positions"]["embedding"]))
        positions_SW[:num] = np.asarray(params["positions"]["embedding"])[:num] @ basis_DW
        student = student | {"positions": {"embedding": positions_SW}}
    return student


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on frozen matrices.

    names: regex over parameter names, for the adapted ones; "" = no adapters, all parameters are trained.
    rank: of each adapter. alpha: adapters are scaled by alpha / rank, so that the best learning rate depends
    less on the rank.
    """

    names: str = ""
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1 (LoraConfig)")
        if self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha} must be positive (LoraConfig)")


def init_lora(params, config: LoraConfig, seed: int, dims=None) -> dict[str, dict[str, jax.Array]]:
    """Returns {name: {"a": [D, r], "b": [r, F]}} of the adapted parameters. b is 0, so new adapters change
    nothing.

    F: the product of all dims of a kernel after the first. dims: `Model.dims`, which say which kernels are
    stacked: each of E experts then has its own adapter, {"a": [E, D, r], "b": [E, r, F]}. Raises ValueError,
    listing the names, if config.names matches none, or if it matches a vector.
    Source: Hu et al., ICLR'22 (arXiv 2106.09685), section 4.1.
    """
    adapters = {}
    matched = leaf_names(leaf_mask(params, config.names, field="compress.lora.names"))
    for index, (name, x) in enumerate(leaf_names(params).items()):
        if not matched[name]:
            continue
        if x.ndim < 2:
            raise ValueError(
                f"compress.lora.names={config.names!r} matches {name}, a vector: name kernels or tables "
                "(LoraConfig)"
            )
        stack = x.shape[:1] if name in (dims or {}) and is_stacked(dims[name]) else ()
        dim = x.shape[len(stack)]
        rest = math.prod(x.shape[len(stack) + 1 :])
        key = jax.random.fold_in(jax.random.key(seed), index)
        a_DR = jax.random.normal(key, (*stack, dim, config.rank)) * dim**-0.5
        adapters[name] = {"a": a_DR, "b": jnp.zeros((*stack, config.rank, rest))}
    return adapters


def merge_lora(params, adapters, config: LoraConfig):
    """The parameters with their adapters added: w + alpha / rank * a @ b.

    Training computes with these, so a merged model gives the same outputs as in training, on a CPU bit for
    bit.
    """

    def merged(name, x):
        if name not in adapters:
            return x
        a_DR, b_RF = adapters[name]["a"], adapters[name]["b"]
        # The barrier keeps XLA from fusing product and sum, which would round differently in some programs.
        delta_DF = jax.lax.optimization_barrier((config.alpha / config.rank * a_DR) @ b_RF)
        return (x + delta_DF.reshape(x.shape)).astype(x.dtype)

    leaves = [merged(name, x) for name, x in leaf_names(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
