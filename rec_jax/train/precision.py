"""Number formats of training: the compute, the scores, the parameters and the optimizer, each by itself."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rec_jax.tree import cast_floats

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}

_FIRST_SCALE = 2.0**10  # of a sum over tokens, not of a mean
_GROWTH_STEPS = 500  # finite steps in a row after which the scale is tried twice as large


@dataclass(frozen=True)
class PrecisionConfig:
    """Scores are summed in f32 and every softmax is taken in f32, whatever is chosen.

    Usual choices: all f32; compute="bf16"; compute="bf16" with output="f32"; compute="f16".
    """

    compute: Literal["f32", "bf16", "f16"] = "f32"  # of the model; "f16" scales its loss
    # Of vectors whose products are scores; "" = as compute, but f32 for f16, for a softmax has probabilities
    # that are too small for f16 before any scaling of the loss.
    output: Literal["", "f32", "bf16"] = ""
    params: Literal["f32", "bf16"] = "f32"  # as they are kept; updates smaller than their rounding are lost
    optimizer: Literal["f32", "bf16"] = "f32"  # its moments, as they are kept

    @property
    def scales_loss(self) -> bool:
        return self.compute == "f16"

    @property
    def compute_dtype(self):
        return DTYPES[self.compute]

    @property
    def output_dtype(self):
        return DTYPES[self.output or ("f32" if self.compute == "f16" else self.compute)]


F32 = PrecisionConfig()


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


class LossScale(NamedTuple):
    """What the loss is multiplied with, so that small gradients of f16 do not vanish.

    Source: Micikevicius et al., ICLR'18 (arXiv 1710.03740), section 3.2, with a scale that adapts.
    """

    scale: jax.Array  # f32
    good_steps: jax.Array  # int32: since it last changed

    @classmethod
    def first(cls) -> "LossScale":
        return cls(jnp.float32(_FIRST_SCALE), jnp.int32(0))

    def after(self, is_finite) -> "LossScale":
        """Half of it after gradients that were not finite, twice after many that were."""
        good = jnp.where(is_finite, self.good_steps + 1, 0)
        grows = good >= _GROWTH_STEPS
        factor = jnp.where(is_finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return LossScale(jnp.maximum(self.scale * factor, 1.0), jnp.where(grows, 0, good))
