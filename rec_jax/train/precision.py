"""Number formats of training: the compute, the scores, the parameters and the optimizer, each by itself."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rec_jax.tree import cast_floats

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


@dataclass(frozen=True)
class PrecisionConfig:
    """Scores are summed in f32 and every softmax is taken in f32, whatever is chosen.

    Usual choices: all f32; compute="bf16"; compute="bf16" with output="f32".
    """

    compute: Literal["f32", "bf16"] = "f32"  # of the model
    output: Literal["", "f32", "bf16"] = ""  # of vectors whose products are scores; "" = as compute
    params: Literal["f32", "bf16"] = "f32"  # as they are kept; updates smaller than their rounding are lost
    optimizer: Literal["f32", "bf16"] = "f32"  # its moments, as they are kept

    @property
    def compute_dtype(self):
        return DTYPES[self.compute]

    @property
    def output_dtype(self):
        return DTYPES[self.output or self.compute]


def kept_as(inner: optax.GradientTransformation, state_dtype: str) -> optax.GradientTransformation:
    """The optimizer with its arrays kept in another type between steps. It computes in f32, whatever the
    type of parameters and gradients."""

    def cast(state, dtype):
        return jax.tree.map(lambda x: cast_floats(x, dtype) if jnp.ndim(x) else x, state)

    def init(params):
        return cast(inner.init(cast(params, jnp.float32)), DTYPES[state_dtype])

    def update(grads, state, params=None):
        grads, state, params = cast((grads, state, params), jnp.float32)
        updates, state = inner.update(grads, state, params)
        return updates, cast(state, DTYPES[state_dtype])

    return optax.GradientTransformation(init, update)
