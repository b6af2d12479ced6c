"""Number formats of training, chosen separately for compute, scores, parameters and optimizer state."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rec_jax.tree import cast_floats

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats. Scores are always summed in f32, and every softmax is computed in f32.

    Usual choices: all f32; compute="bf16"; compute="bf16" with output="f32".
    """

    compute: Literal["f32", "bf16"] = "f32"  # the model's forward and backward pass
    output: Literal["", "f32", "bf16"] = ""  # vectors whose products are scores; "" = as compute
    params: Literal["f32", "bf16"] = "f32"  # stored parameters; bf16 loses updates below its precision
    optimizer: Literal["f32", "bf16"] = "f32"  # stored optimizer moments

    @property
    def compute_dtype(self):
        return DTYPES[self.compute]

    @property
    def output_dtype(self):
        return DTYPES[self.output or self.compute]


def kept_as(inner: optax.GradientTransformation, state_dtype: str) -> optax.GradientTransformation:
    """Wraps an optimizer so that its arrays have dtype `state_dtype` between steps. It computes in f32 for
    parameters and gradients of any dtype."""

    def cast(state, dtype):
        return jax.tree.map(lambda x: cast_floats(x, dtype) if jnp.ndim(x) else x, state)

    def init(params):
        return cast(inner.init(cast(params, jnp.float32)), DTYPES[state_dtype])

    def update(grads, state, params=None):
        grads, state, params = cast((grads, state, params), jnp.float32)
        updates, state = inner.update(grads, state, params)
        return updates, cast(state, DTYPES[state_dtype])

    return optax.GradientTransformation(init, update)
