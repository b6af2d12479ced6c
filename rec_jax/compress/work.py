"""The number of multiply-adds of programs and models."""

import math

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from rec_jax.data.batch import Batch
from rec_jax.models.base import Model


def multiply_adds(jaxpr) -> int:
    """The multiply-adds of all matrix products of a program. The body of a scan counts once per iteration.
    Softmax tiles that a program may skip at run time count too, so the number is too high for BERT4Rec."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[dim] for dim in contracted)
            total += math.prod(eqn.outvars[0].aval.shape) * depth
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(eqn.params):
            total += times * multiply_adds(inner)
    return total


def answer_multiply_adds(model: Model, num_tokens: int) -> int:
    """The multiply-adds that encode one history of num_tokens and score the catalogue for its next item.
    Only matrix products count. For a generative retrieval model, the beam search does not count."""
    ids = jnp.zeros((1, num_tokens), jnp.int32)
    columns = {name: ids for name in ("item", *model.columns)}
    batch = Batch(columns, segments=ids + 1, positions=ids, is_query=ids > 0)

    def encode(params):
        return model.bind(params)(batch, query_positions=(jnp.array([0]), jnp.array([num_tokens - 1])))

    work = multiply_adds(jax.make_jaxpr(encode)(model.abstract_params).jaxpr)
    if "items" not in model.tables:
        return work
    num_entries, dim = model.abstract_params["items"]["embedding"].shape
    return work + (num_entries - 1) * dim
