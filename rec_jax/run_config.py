"""All settings of a run, and the combinations of them that are refused."""

import dataclasses
import functools
from collections.abc import Callable

from rec_jax.compress.config import CompressConfig
from rec_jax.data.datasets import DataConfig
from rec_jax.eval.evaluator import EvalConfig
from rec_jax.mesh import MeshConfig
from rec_jax.models.baselines import BASELINES
from rec_jax.models.registry import MODELS, ModelConfig
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.models.semantic_ids import SemanticIdsConfig
from rec_jax.objectives.augment import AugmentConfig
from rec_jax.objectives.contrastive import ContrastiveConfig
from rec_jax.objectives.token_loss import LossConfig, SoftmaxConfig, is_sampled
from rec_jax.tables.config import TableConfig
from rec_jax.train.loop import TrainConfig
from rec_jax.train.optim import OptimConfig
from rec_jax.train.precision import PrecisionConfig


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run is made of. Config files start from its defaults."""

    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = SASRecConfig()
    semantic_ids: SemanticIdsConfig = SemanticIdsConfig()
    loss: LossConfig = SoftmaxConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    table: TableConfig = TableConfig()
    precision: PrecisionConfig = PrecisionConfig()
    compress: CompressConfig = CompressConfig()
    augment: AugmentConfig = AugmentConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()

    def __post_init__(self):
        for refusal in REFUSALS:
            if refusal.meets(self):
                raise ValueError(refusal.text(self))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A combination of settings that cannot be.

    meets: does a config have it? setting: the key that is wrong in the message, its value is filled in.
    reason: why, and the way out.
    """

    meets: Callable[[ExperimentConfig], bool]
    setting: str
    reason: str

    def text(self, config: ExperimentConfig) -> str:
        reason = self.reason.format(model=config.model.type, config=config)
        return f"{self.setting}={_value(config, self.setting)!r} {reason} (ExperimentConfig)"


def _value(config, setting: str):
    return functools.reduce(getattr, setting.split("."), config)


def _must_be_default(settings: tuple[str, ...], meets, reason: str) -> list[Refusal]:
    """Settings that must stay at their defaults in the configs that `meets` is true of."""

    def refusal(setting):
        default = _value(ExperimentConfig, setting)
        return Refusal(lambda c: meets(c) and _value(c, setting) != default, setting, reason)

    return [refusal(setting) for setting in settings]


def _has_tables(config) -> bool:
    return bool(MODELS[type(config.model)].tables)


def _is_plain(config) -> bool:
    """Are the tables parameters like any other, as far as the config says?"""
    table = config.table
    return table.optimizer == "dense" and table.layout in ("auto", "replicated")


# One reason each. The first four kinds cannot be at all; the rest nobody has built.
REFUSALS = [
    # A sparse update, or a sharded table, and a loss that reads otherwise.
    Refusal(
        lambda c: c.table.optimizer != "dense" and not is_sampled(c.loss),
        "table.optimizer",
        "updates the entries that a batch reads, but loss.type={config.loss.type!r} reads the whole "
        "catalogue: use a sampled loss, or table.optimizer='dense'",
    ),
    Refusal(
        lambda c: c.table.optimizer == "dense" and c.table.layout == "rows" and is_sampled(c.loss),
        "table.layout",
        "with table.optimizer='dense' is for loss.type='softmax', not {config.loss.type!r}: use a sparse "
        "table.optimizer with a sampled loss",
    ),
    # Semantic ids have no item vectors.
    *_must_be_default(
        ("loss.type", "loss.matryoshka", "loss.ips_power", "loss.popularity_discount", "model.num_future")
        + ("contrastive.weight", "augment", "precision.output", "compress.distill.teachers"),
        lambda c: not _has_tables(c),
        "needs item vectors, and model.type={model!r} scores semantic ids: leave it at its default",
    ),
    Refusal(
        lambda c: not _has_tables(c) and not _is_plain(c),
        "table",
        "is of an item embedding table, and model.type={model!r} has none: leave it at its default",
    ),
    # Masked items are drawn anew in each step, and nothing is further ahead than what is masked.
    *_must_be_default(
        ("augment", "contrastive.weight", "model.num_future"),
        lambda c: not MODELS[type(c.model)].is_causal,
        "is for models that predict the next item, and model.type={model!r} predicts masked items: leave it "
        "at its default",
    ),
    # Sizes.
    Refusal(
        lambda c: c.loss.matryoshka and c.loss.matryoshka[-1] >= c.model.table_dim,
        "loss.matryoshka",
        "must be below the {config.model.table_dim} dims of the vectors, which are always scored",
    ),
    Refusal(
        lambda c: c.model.num_future > c.data.max_len,
        "model.num_future",
        "must be at most data.max_len={config.data.max_len}: there is nothing further ahead",
    ),
    Refusal(
        lambda c: c.contrastive.weight and c.contrastive.view == "dropout" and not c.model.dropout,
        "contrastive.view",
        "needs model.dropout above 0, without which both views are the same: set it, or "
        "contrastive.view='augment'",
    ),
    # Not built.
    *_must_be_default(
        ("loss.matryoshka", "loss.ips_power", "loss.popularity_discount", "model.num_future"),
        lambda c: bool(c.compress.distill.teachers),
        "is not supported with compress.distill.teachers, whose loss knows nothing of it: leave it at its "
        "default",
    ),
    *_must_be_default(
        ("compress.distill.teachers", "compress.lora.names", "compress.prune.names", "compress.prune.hold")
        + ("compress.quant.aware",),
        lambda c: not _is_plain(c),
        "needs the item embedding table among the dense parameters: set table.optimizer=dense and "
        "table.layout=replicated",
    ),
    Refusal(
        lambda c: not _is_plain(c) and (c.precision.params, c.precision.optimizer) != ("f32", "f32"),
        "precision",
        "keeps numbers in bf16, which sharded tables and sparse updates cannot: set table.optimizer=dense "
        "and table.layout=replicated",
    ),
    Refusal(
        lambda c: c.compress.quant.aware and c.mesh.model > 1,
        "compress.quant.aware",
        "needs whole kernels, whose ranges it looks at: mesh.model={config.mesh.model} splits them; set "
        "mesh.model=1",
    ),
    Refusal(
        lambda c: c.compress.lora.names and (c.compress.prune.names or c.compress.prune.hold),
        "compress.lora.names",
        "is not supported with compress.prune: masks on adapters leave the merged weights dense; prune "
        "first, or last",
    ),
    Refusal(
        lambda c: bool(set(c.eval.baselines) - set(BASELINES)),
        "eval.baselines",
        f"names what is no baseline: use {', '.join(BASELINES)}",
    ),
]
