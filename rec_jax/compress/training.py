"""Compression in training: masks in the optimizer, adapters, fake quantization, teachers in the loss."""

import math
from functools import cached_property

import jax

from rec_jax.compress.config import CompressConfig
from rec_jax.compress.factor import init_lora, merge_lora
from rec_jax.compress.prune import hold_zeros, prune
from rec_jax.compress.quant import fake_quantize_params
from rec_jax.compress.shrink import ShrinkConfig
from rec_jax.models.base import Model
from rec_jax.nn.dims import is_stacked
from rec_jax.objectives.distill import distill_sum
from rec_jax.tree import leaf_mask, leaf_names


class Compression:
    """Applies the `compress` section in a training step.

    teachers: [(model, params), ...] for compress.distill. base: the frozen parameters under LoRA adapters.
    total_steps: the number of training steps, for schedules.
    """

    def __init__(
        self, config: CompressConfig, model: Model, total_steps: int, seed: int, teachers=(), base=None
    ):
        self._config, self._model, self._total_steps, self._seed = config, model, total_steps, seed
        self._teachers = [teacher for teacher, _ in teachers]
        if config.lora.names and base is None:
            raise ValueError(
                f"compress.lora.names={config.lora.names!r} adapts a trained run: use experiments.compress "
                "--workdir=RUN (LoraConfig)"
            )
        if len(teachers) != len(config.distill.teachers):
            raise ValueError(
                f"compress.distill.teachers={config.distill.teachers}: {len(teachers)} of these were "
                "loaded; load them and pass them as `teachers` (DistillConfig)"
            )
        if config.shrink != ShrinkConfig():
            raise ValueError(
                f"compress.shrink={config.shrink} shrinks a trained run: use experiments.compress "
                "--workdir=RUN; set the size of a new model by model.* (ShrinkConfig)"
            )
        base = base if config.lora.names else None
        self.frozen = {"teachers": [params for _, params in teachers], "base": base}
        self.distils = bool(teachers)

    def init(self, params):
        """The parameters to train: adapters if compress.lora.names is set, else the model's parameters."""
        if not self._config.lora.names:
            return params
        return init_lora(params, self._config.lora, self._seed, self._model.dims)

    @cached_property
    def abstract_params(self):
        return jax.eval_shape(self.init, self._model.abstract_params)

    def optimizer(self, inner, params, specs):
        """The optimizer `inner` with pruning masks. params: the trained parameters; only their names and
        shapes are read."""
        config = self._config.prune
        if config.hold:
            inner = hold_zeros(inner, config.hold, params)
        if config.names and config.structure != "weights":
            matched = leaf_names(leaf_mask(params, config.names, field="compress.prune.names"))
            stacked = [n for n, dims in self._model.dims.items() if matched.get(n) and is_stacked(dims)]
            if stacked:
                raise ValueError(
                    f"compress.prune.structure={config.structure!r} would remove rows or columns from all "
                    f"experts of {stacked[0]} at once: use structure='weights', or match other names "
                    "(PruneConfig)"
                )
        return prune(inner, config, params, self._total_steps, specs, self._seed)

    def adapt(self, params, frozen, step):
        """The parameters that the model computes with, made from the trained parameters."""
        params = self._merge(params, frozen)
        if self._config.quant.aware:
            start = math.ceil(self._config.quant.aware_from * self._total_steps)
            params = fake_quantize_params(params, self._config.quant, step >= start, self._model.dims)
        return params

    def final(self, params):
        """The result of `adapt` after the last step."""
        return self.adapt(params, self.frozen, self._total_steps)

    def merged(self, params):
        """The model's parameters with adapters merged, without fake quantization."""
        return self._merge(params, self.frozen)

    def _merge(self, params, frozen):
        lora = self._config.lora
        return merge_lora(frozen["base"], params, lora) if lora.names else params

    def distil(self, loss, student, batch, negatives, frozen):
        """The loss mixed with the distillation loss of the teachers."""
        teachers = []
        for model, params in zip(self._teachers, frozen["teachers"], strict=True):
            module, hidden = model.bind(params), []
            teachers.append((module(batch, hidden=hidden), module.item_vectors(), hidden))
        return distill_sum(self._config.distill, loss, student, teachers, batch, negatives)


def first_share_in_force(config: CompressConfig) -> float:
    """The share of training after which all masks and fake quantization are in force. A model evaluated
    earlier is not the one that will be stored."""
    pruned = config.prune.end if config.prune.names else 0.0
    aware = config.quant.aware_from if config.quant.aware else 0.0
    return max(pruned, aware)
