"""The config of a run, and the combinations of settings that are refused."""

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
    """All settings of a run. Config files start from these defaults."""

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
            if refusal.applies(self):
                raise ValueError(refusal.text(self))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A combination of settings that is refused.

    applies: whether a config has the combination. setting: the key that the message names, with its value.
    reason: why it is refused, and what to set instead.
    """

    applies: Callable[[ExperimentConfig], bool]
    setting: str
    reason: str

    def text(self, config: ExperimentConfig) -> str:
        reason = self.reason.format(model=config.model.type, config=config)
        return f"{self.setting}={_value(config, self.setting)!r} {reason} (ExperimentConfig)"


def _value(config, setting: str):
    return functools.reduce(getattr, setting.split("."), config)


def _must_be_default(settings: tuple[str, ...], applies, reason: str) -> list[Refusal]:
    """Refusals of every value but the default of `settings`, in configs for which `applies` is true."""

    def refusal(setting):
        default = _value(ExperimentConfig, setting)
        return Refusal(lambda c: applies(c) and _value(c, setting) != default, setting, reason)

    return [refusal(setting) for setting in settings]


def _has_tables(config) -> bool:
    return bool(MODELS[type(config.model)].tables)


def _is_plain(config) -> bool:
    """Whether the tables are plain parameters, according to the config."""
    table = config.table
    return table.optimizer == "dense" and table.layout in ("auto", "replicated")


# Combinations that make no sense come first; those after "Not implemented" would be possible.
REFUSALS = [
    # A sparse update needs a sampled loss; a dense update of a row-sharded table needs the full softmax.
    Refusal(
        lambda c: c.table.optimizer != "dense" and not is_sampled(c.loss),
        "table.optimizer",
        "updates only the entries that a batch reads, but loss.type={config.loss.type!r} reads the whole "
        "catalogue: use a sampled loss, or table.optimizer='dense'",
    ),
    Refusal(
        lambda c: c.table.optimizer == "dense" and c.table.layout == "rows" and is_sampled(c.loss),
        "table.layout",
        "with table.optimizer='dense' needs loss.type='softmax', not {config.loss.type!r}: set a sparse "
        "table.optimizer, as loss.type={config.loss.type!r} is a sampled loss",
    ),
    # Semantic ids have no item vectors.
    *_must_be_default(
        ("loss.type", "loss.matryoshka", "loss.ips_power", "loss.popularity_discount", "model.num_future")
        + ("contrastive.weight", "augment", "precision.output", "compress.distill.teachers"),
        lambda c: not _has_tables(c),
        "needs item vectors, but model.type={model!r} scores semantic ids: leave it at its default",
    ),
    Refusal(
        lambda c: not _has_tables(c) and not _is_plain(c),
        "table",
        "configures the item embedding table, but model.type={model!r} has none: leave it at its default",
    ),
    # A model of masked items draws new masks in each step, and has no items further ahead to predict.
    *_must_be_default(
        ("augment", "contrastive.weight", "model.num_future"),
        lambda c: not MODELS[type(c.model)].is_causal,
        "is for models that predict the next item, but model.type={model!r} predicts masked items: leave it "
        "at its default",
    ),
    # Sizes.
    Refusal(
        lambda c: c.loss.matryoshka and c.loss.matryoshka[-1] >= c.model.table_dim,
        "loss.matryoshka",
        "must hold only sizes below the {config.model.table_dim} dims of the whole vectors, which are always "
        "in the loss: remove the others",
    ),
    Refusal(
        lambda c: c.model.num_future > c.data.max_len,
        "model.num_future",
        "must be at most data.max_len={config.data.max_len}, the number of events in a history: lower it",
    ),
    Refusal(
        lambda c: c.contrastive.weight and c.contrastive.view == "dropout" and not c.model.dropout,
        "contrastive.view",
        "needs model.dropout above 0, because otherwise both views are the same: set model.dropout, or "
        "contrastive.view='augment'",
    ),
    # Not implemented.
    *_must_be_default(
        ("loss.matryoshka", "loss.ips_power", "loss.popularity_discount", "model.num_future"),
        lambda c: bool(c.compress.distill.teachers),
        "is not supported with compress.distill.teachers, whose loss does not include it: leave it at its "
        "default",
    ),
    *_must_be_default(
        ("compress.distill.teachers", "compress.lora.names", "compress.prune.names", "compress.prune.hold")
        + ("compress.quant.aware",),
        lambda c: not _is_plain(c),
        "needs an item embedding table that is a plain parameter: set table.optimizer=dense and "
        "table.layout=replicated",
    ),
    Refusal(
        lambda c: not _is_plain(c) and (c.precision.params, c.precision.optimizer) != ("f32", "f32"),
        "precision",
        "stores parameters or optimizer state in bf16, which sharded tables and sparse updates do not "
        "support: set table.optimizer=dense and table.layout=replicated",
    ),
    Refusal(
        lambda c: c.compress.quant.aware and c.mesh.model > 1,
        "compress.quant.aware",
        "needs whole kernels, to measure their ranges, but mesh.model={config.mesh.model} splits them: set "
        "mesh.model=1",
    ),
    Refusal(
        lambda c: c.compress.lora.names and (c.compress.prune.names or c.compress.prune.hold),
        "compress.lora.names",
        "is not supported with compress.prune, because masks on adapters leave the merged weights dense: "
        "prune in a run before or after the adapters",
    ),
    Refusal(
        lambda c: bool(set(c.eval.baselines) - set(BASELINES)),
        "eval.baselines",
        f"contains an unknown baseline: choose from {', '.join(BASELINES)}",
    ),
]
