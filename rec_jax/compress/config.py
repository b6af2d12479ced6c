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
    """What makes a model smaller, in the order in which it happens: the architecture shrinks (or a student
    takes its place), the training distils, masks and quantizes as it says, the result is stored in integers.

    recipe: of `python -m experiments.compress`: sets what follows, and the fine-tuning, unless given.
    floats: type of the numbers that are stored without being quantized.
    """

    recipe: str = ""
    shrink: ShrinkConfig = ShrinkConfig()
    distill: DistillConfig = DistillConfig()
    lora: LoraConfig = LoraConfig()
    prune: PruneConfig = PruneConfig()
    quant: QuantConfig = QuantConfig()
    floats: Literal["f32", "bf16"] = "f32"
