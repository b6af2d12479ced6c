"""The `compress` section of every config."""

from dataclasses import dataclass
from typing import Literal

from rec_jax.compress.factor import LoraConfig
from rec_jax.compress.prune import PruneConfig
from rec_jax.compress.quant import QuantConfig
from rec_jax.compress.shrink import ShrinkConfig
from rec_jax.objectives.distill import DistillConfig


@dataclass(frozen=True)
class CompressConfig:
    """Settings of compression. The steps run in this order: the architecture is shrunk (or replaced by a
    student), training distils, masks and quantizes, and the result is stored in integers.

    recipe: a named recipe of `python -m experiments.compress`; it sets the keys below and those of the
      fine-tuning, except the ones given explicitly.
    floats: dtype in which numbers that are not quantized are stored.
    """

    recipe: str = ""
    shrink: ShrinkConfig = ShrinkConfig()
    distill: DistillConfig = DistillConfig()
    lora: LoraConfig = LoraConfig()
    prune: PruneConfig = PruneConfig()
    quant: QuantConfig = QuantConfig()
    floats: Literal["f32", "bf16"] = "f32"
