"""A run from end to end: config -> data -> model -> training -> test score. The entry points in
`experiments/` are thin wrappers around this class."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax import mesh as mesh_lib
from rec_jax import processes
from rec_jax.compress import artifact
from rec_jax.compress.config import CompressConfig
from rec_jax.compress.distill import DistillConfig
from rec_jax.compress.prune import last_rewind
from rec_jax.compress.quant import dequantize_params
from rec_jax.compress.training import Compression, check_mesh, first_share_in_force
from rec_jax.config import build
from rec_jax.data.datasets import DataConfig, load_dataset
from rec_jax.data.negatives import make_sampler
from rec_jax.data.pipeline import BatchSource, make_iterator
from rec_jax.eval.evaluator import EvalConfig, check_eval, evaluate
from rec_jax.mesh import MeshConfig, replicate
from rec_jax.models.base import define_model, get_table, init_model, with_table, without_table
from rec_jax.models.baselines import BASELINES, nearest_items
from rec_jax.models.beam import BeamRanker
from rec_jax.models.ranker import Ranker, ScoreRanker
from rec_jax.models.registry import MODELS, ModelConfig
from rec_jax.models.registry import model_builder as registered_builder
from rec_jax.models.sasrec import SASRecConfig
from rec_jax.models.scoring import SequenceRanker
from rec_jax.models.semantic_ids import CodesConfig, load_codes
from rec_jax.nn.layouts import shardings
from rec_jax.nn.parallel import partition
from rec_jax.train import checkpoint
from rec_jax.train.augment import AugmentConfig
from rec_jax.train.contrastive import ContrastiveConfig, Views
from rec_jax.train.contrastive import check as check_views
from rec_jax.train.heads import check as check_heads
from rec_jax.train.loop import TrainConfig, TrainingData, Validation, fit
from rec_jax.train.losses import LossConfig
from rec_jax.train.optim import OptimConfig, make_optimizer, make_schedule
from rec_jax.train.plan import LayoutCost, choose_layout, ids_per_device, layout_costs
from rec_jax.train.popularity import with_popularity
from rec_jax.train.precision import PrecisionConfig, kept_as
from rec_jax.train.state import TrainState
from rec_jax.train.step import init_state, make_catch_up, make_train_step, state_specs
from rec_jax.train.tables import TableConfig, make_item_table
from rec_jax.train.tables import check as check_table
from rec_jax.tree import num_params
from rec_jax.workdir import training_lock


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run is made of. Config files start from its defaults."""

    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = SASRecConfig()
    codes: CodesConfig = CodesConfig()
    loss: LossConfig = LossConfig()
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
        check_table(self.table, self.loss)
        _check_generating(self)
        check_views(self.augment, self.contrastive, self.model)
        check_heads(self.loss, self.model, self.data.max_len, self.compress.distill.teachers)
        if unknown := set(self.eval.baselines) - set(BASELINES):
            raise ValueError(
                f"eval.baselines={self.eval.baselines}: there is no {', '.join(sorted(unknown))}; use "
                f"{', '.join(BASELINES)} (EvalConfig)"
            )
        num_experts = getattr(self.model, "num_experts", 0)
        if num_experts and self.compress != CompressConfig():
            raise ValueError(
                f"model.num_experts={num_experts} does not go with compress, which knows no stacked kernels: "
                "set model.num_experts=0; such a model can still be a teacher of one (ExperimentConfig)"
            )


def _check_generating(config: ExperimentConfig) -> None:
    """Raises ValueError where a model without a table of items meets settings of one."""
    if not MODELS[type(config.model)].generates:
        return
    asked = {
        "loss.type": (config.loss.type, ("softmax",)),
        "table.optimizer": (config.table.optimizer, ("dense",)),
        "table.layout": (config.table.layout, ("auto", "replicated")),
        "compress": (config.compress, (CompressConfig(),)),
        "loss.matryoshka": (config.loss.matryoshka, ((),)),
        "loss.ips_power": (config.loss.ips_power, (0,)),
        "loss.popularity_discount": (config.loss.popularity_discount, (0,)),
        "model.num_future": (config.model.num_future, (1,)),
        "augment": (config.augment, (AugmentConfig(),)),
        "contrastive.weight": (config.contrastive.weight, (0,)),
        "precision.output": (config.precision.output, ("",)),
    }
    for name, (value, possible) in asked.items():
        if value not in possible:
            raise ValueError(
                f"{name}={value!r} is of a table of items, and model.type={config.model.type!r} has none: "
                "leave it at its default (ExperimentConfig)"
            )


def model_builder(config: ExperimentConfig, num_items: int, codes=None):
    """rngs -> the module. codes: of a model that generates; None = meaningless ones."""
    return registered_builder(config.model, num_items, config.data.max_len, codes)


def plan_layouts(config: ExperimentConfig, num_items: int, mesh) -> list[LayoutCost]:
    data, model = mesh.shape["data"], mesh.shape["model"]
    rows, num_views = config.train.batch_rows, 2 * config.contrastive.augments
    num_ids = ids_per_device(config.loss, rows, config.data.max_len, data, num_views)
    return layout_costs(
        config.table, config.optim.type, num_items + 1, config.model.table_dim, num_ids, data, model
    )


class Program:
    """What a config computes on a mesh: the model and its training step, without the data.

    item_counts: int[V + 1] training events of each item, for popularity samplers and hot rows. teachers,
    base: see `Compression`. codes: see `model_builder`.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        num_items: int,
        mesh,
        total_steps: int,
        item_counts,
        teachers=(),
        base=None,
        codes=None,
    ):
        self.config, self.mesh, self._item_counts = config, mesh, item_counts
        self._build = model_builder(config, num_items, codes)
        self.model = define_model(self._build)
        self.layout_costs = plan_layouts(config, num_items, mesh)
        self.layout = choose_layout(config.table, self.layout_costs)
        table = dataclasses.replace(config.table, layout=self.layout)
        self.item_table = make_item_table(table, config.optim, total_steps, item_counts, mesh)
        check_mesh(config.compress, self.item_table is not None, mesh.shape["model"])
        _check_precision(config, self.item_table is not None)
        self.extras = None
        if config.compress != CompressConfig():  # else a step does nothing for it
            self.extras = Compression(
                config.compress, self.model, total_steps, config.seed, teachers, replicate(base, mesh)
            )
        abstract = self.model.abstract_params if self.extras is None else self.extras.abstract_params
        dense = abstract if self.item_table is None else without_table(abstract)
        split = config.model.tensor_parallel(mesh.shape["model"])
        self.specs = partition(dense, split, mesh, fully_sharded=config.mesh.fully_sharded)
        self.optimizer = make_optimizer(config.optim, dense, total_steps)
        if config.precision.params != "f32" or config.precision.optimizer != "f32":
            self.optimizer = kept_as(self.optimizer, config.precision.optimizer)
        if self.extras:
            self.optimizer = self.extras.optimizer(self.optimizer, dense, self.specs)
        self.state_specs = state_specs(
            abstract, self.optimizer, self.specs, self.item_table, config.precision
        )

    @functools.cached_property
    def sampler(self):  # made only where it is used: its tables take seconds for millions of items
        sampler = make_sampler(self.config.loss.sampler, self._item_counts)
        return with_popularity(self.config.loss, sampler, self._item_counts)

    def init_state(self, params=None) -> TrainState:
        """params: of the model, to start from; None = drawn by the seed."""
        params = init_model(self._build, self.config.seed)[1] if params is None else params
        return self._init_state(params, self.mesh)

    def _init_state(self, params, mesh):
        params = self.extras.init(params) if self.extras else params
        return init_state(params, self.optimizer, mesh, self.item_table, self.specs, self.config.precision)

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of a state; computes nothing."""
        make = partial(self._init_state, mesh=self.mesh)
        state = jax.eval_shape(make, self.model.abstract_params)
        return jax.tree.map(_laid, state, shardings(self.mesh, self.state_specs))

    def abstract_params(self):
        return self.abstract_state().params

    def make_step(self, neighbours_VK=None):
        """neighbours_VK: see `augment`; needed to substitute items."""
        config = self.config
        views = Views(config.augment, config.contrastive, neighbours_VK)
        has_views = config.augment.is_on or config.contrastive.weight
        return make_train_step(
            self.model,
            self.optimizer,
            config.loss,
            self.sampler,
            self.mesh,
            micro_rows=config.train.micro_rows,
            precision=config.precision,
            seed=config.seed,
            clip_norm=config.optim.clip_norm,
            item_table=self.item_table,
            specs=self.specs,
            reduce=config.mesh.reduce,
            extras=self.extras,
            views=views if has_views else None,
        )

    def make_catch_up(self):
        return make_catch_up(self.item_table, self.mesh, self.state_specs)


def _check_precision(config: ExperimentConfig, touches_rows: bool) -> None:
    precision = config.precision
    if touches_rows and (precision.params, precision.optimizer) != ("f32", "f32"):
        raise ValueError(
            f"precision={precision} keeps numbers in bf16, which sharded tables and sparse updates cannot: "
            "set table.optimizer=dense and table.layout=replicated (PrecisionConfig)"
        )


class Experiment:
    """A config and its working directory, `workdir`, which holds all that the run reads and writes.

    base: parameters of a trained run, for a run that starts from them. dataset: if it is loaded already.
    """

    def __init__(self, config: ExperimentConfig, workdir, base=None, dataset=None):
        self.config, self.workdir, self._base = config, pathlib.Path(workdir), base
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.mesh = mesh_lib.make_mesh(config.mesh)
        processes.check_same("configs", repr(config))
        with processes.first_before_others():
            self.dataset = dataset or load_dataset(config.data, self.workdir / "data")
        self.histories, self.split = self.dataset.histories, self.dataset.split
        self.config = config = self._with_layout(config)
        self.codes = None
        if MODELS[type(config.model)].generates:
            self.codes = load_codes(config.codes, config.data, self.dataset, self.workdir, config.seed)
        self.model = define_model(model_builder(config, self.histories.num_items, self.codes))
        if missing := set(self.model.columns) - {feature.name for feature in self.dataset.schema}:
            names = " and ".join(f"data.{name}" for name in sorted(missing))
            raise ValueError(
                f"model.type={config.model.type!r} reads {', '.join(sorted(missing))} of each event, and "
                f"this log has none: name the column by {names}, or see how the model's config does without"
            )

    def _with_layout(self, config: ExperimentConfig) -> ExperimentConfig:
        """The config with the layout of the table that this run began with, or that the plan chooses: another
        mesh would choose another, whose checkpoints have other arrays."""
        if config.table.layout != "auto":
            return config
        path = self.workdir / "config.json"
        if MODELS[type(config.model)].generates:
            layout = "replicated"  # there is no table of items to be spread
        elif path.exists():
            layout = json.loads(path.read_text())["table"]["layout"]
        else:
            layout = choose_layout(config.table, plan_layouts(config, self.histories.num_items, self.mesh))
        return dataclasses.replace(config, table=dataclasses.replace(config.table, layout=layout))

    @classmethod
    def open(cls, workdir) -> "Experiment":
        """The experiment that was trained in `workdir`.

        Raises ValueError if there is none.
        """
        path = pathlib.Path(workdir) / "config.json"
        if not path.exists():
            raise ValueError(f"--workdir={workdir} holds no run ({path} is missing): train one there first")
        return cls(build(ExperimentConfig, json.loads(path.read_text())), workdir)

    @functools.cached_property
    def num_params(self) -> int:
        return num_params(self.model.abstract_params)

    def describe(self) -> str:
        """The mesh and how the table of items lies on it and learns."""
        mesh, table = self.mesh, self.config.table
        platform = mesh.devices.flat[0].platform
        lies = f"mesh: data={mesh.shape['data']}, model={mesh.shape['model']} ({platform})"
        if self.codes:
            return f"{lies}\n{self.codes.report}"
        return (
            f"{lies}; table of items: {self.histories.num_items + 1:,} rows x {self.config.model.table_dim}, "
            f"layout {table.layout}, optimizer {table.optimizer}"
        )

    @property
    def _schema(self):
        """The features that the model reads."""
        return tuple(feature for feature in self.dataset.schema if feature.name in self.model.columns)

    def batch_source(self) -> BatchSource:
        """The batches of all epochs, this process's part of each."""
        config = self.config
        return BatchSource(
            self.histories,
            self.split,
            max_len=config.data.max_len,
            batch_rows=config.train.batch_rows,
            epochs=config.train.epochs,
            seed=config.seed,
            all_windows=config.train.all_windows,
            is_causal=self.model.is_causal,
            schema=self._schema,
            host=jax.process_index(),
            num_hosts=jax.process_count(),
        )

    def fit(self):
        """Trains, or resumes where an earlier session in `workdir` stopped. Returns the loop's FitResult.

        Raises ValueError if another process trains there.
        """
        with training_lock(self.workdir) if processes.is_first() else contextlib.nullcontext():
            return self._fit()

    def _fit(self):
        check_eval(self.config.eval, self.histories, self.split, self.config.seed)
        artifact.remove(self.workdir)  # of a run before this one
        config, source = self.config, self.batch_source()
        program = self.program(len(source), self._teachers())
        config_json = dataclasses.asdict(config)
        path = self.workdir / "config.json"
        if not path.exists():
            write_json(path, config_json)
        rate = make_schedule(config.optim, len(source))
        fitted = fit(
            program.init_state(self._base),
            program.make_step(self._neighbours()),
            TrainingData(
                make_iterator(source),
                source.steps_per_epoch,
                place=lambda batch: mesh_lib.place_batch(batch, self.mesh),
                describe=lambda step: _name_users(self.histories, source.users(step)),
            ),
            Validation(
                lambda params: self.evaluate(self.scorer(params), "val", quick=True),
                prepare=program.make_catch_up(),
                begin=first_share_in_force(config.compress),
            ),
            config=config.train,
            workdir=self.workdir,
            run_info={"config": config_json, "split": self.split.checksum} | self._codes_info(),
            learning_rate=lambda step: rate(step - last_rewind(config.compress.prune, len(source), step)),
        )
        write_json(path, config_json)  # an extended run has other epochs than the file says
        return fitted

    def program(self, total_steps: int = 1, teachers=None) -> "Program":
        """teachers: needed to train, where the config has some."""
        config = self.config
        if teachers is None:  # nothing is to be trained
            compress = dataclasses.replace(config.compress, distill=DistillConfig())
            config = dataclasses.replace(config, compress=compress)
        counts = self.split.train_item_counts(self.histories)
        num_items = self.histories.num_items
        return Program(
            config, num_items, self.mesh, total_steps, counts, teachers or (), self._base, self.codes
        )

    def _codes_info(self) -> dict[str, str]:
        """What ties checkpoints to the codes that they were trained with."""
        return {} if self.codes is None else {"codes": self.codes.digest}

    def _neighbours(self):
        """The nearest items of each, where training substitutes them."""
        config = self.config
        asking = [config.augment]
        if config.contrastive.augments:
            asking.append(config.contrastive.augment)
        nums = [section.num_neighbours for section in asking if section.substitute]
        return jnp.asarray(nearest_items(self.histories, self.split, max(nums))) if nums else None

    def _teachers(self) -> list:
        """[(model, params)] of compress.distill.teachers.

        Raises ValueError for one that was trained on another split or cannot read histories as long.
        """
        teachers = []
        for workdir in self.config.compress.distill.teachers:
            teacher = Experiment.open(workdir)
            if teacher.split.checksum != self.split.checksum:
                raise ValueError(
                    f"teachers={workdir}: it learnt from split {teacher.split.checksum}, this run has "
                    f"{self.split.checksum} (DistillConfig)"
                )
            if teacher.config.data.max_len < self.config.data.max_len:
                raise ValueError(
                    f"teachers={workdir}: it reads data.max_len={teacher.config.data.max_len} events, this "
                    f"run {self.config.data.max_len}: set data.max_len to as many at most (DistillConfig)"
                )
            if not (teacher.model.is_causal and self.model.is_causal) or teacher.model.generates:
                raise ValueError(
                    f"teachers={workdir}: only causal models with tables of items teach and learn "
                    f"({teacher.config.model.type} teaches {self.config.model.type}) (DistillConfig)"
                )
            params = dequantize_params(teacher.model_params())
            teachers.append((teacher.model, replicate(params, self.mesh)))
        return teachers

    def best_params(self):
        """Parameters of the best validation score, as they lie in training.

        Raises ValueError if the workdir holds no finished evaluation.
        """
        restored = checkpoint.restore_best(self.workdir / "checkpoints", self.program().abstract_params())
        if restored is None:
            raise ValueError(f"{self.workdir} holds no best checkpoint yet: let the training evaluate once")
        return restored.state

    def trained_params(self):
        """The best parameters of the training as the model takes them, whole on every device."""
        program, params = self.program(), self.best_params()
        if program.item_table:
            params = with_table(params, program.item_table.layout.unplace(get_table(params)))
        return program.extras.merged(params) if program.extras else params

    def model_params(self):
        """Those that a compressed run stored, or `trained_params`."""
        return artifact.load(self.workdir) if artifact.exists(self.workdir) else self.trained_params()

    def scorer(self, params, dims: int = 0) -> Ranker:
        """params: as they lie in training. dims: see `SequenceRanker`."""
        program = self.program()
        params = program.extras.final(params) if program.extras else params
        return self.plain_scorer(params, program.item_table and program.item_table.layout, dims)

    def best_scorer(self, dims: int = 0) -> Ranker:
        """Of what a compressed run stored, or of the best parameters of the training."""
        if artifact.exists(self.workdir):
            return self.plain_scorer(artifact.load(self.workdir), dims=dims)
        return self.scorer(self.best_params(), dims)

    def plain_scorer(self, params, layout=None, dims: int = 0) -> Ranker:
        """params: as the model takes them; layout: of the table of items, if it is spread.

        Raises ValueError for more dims than there are.
        """
        if dims > (full := self.config.model.table_dim):
            raise ValueError(f"dims={dims}: the vectors of {self.workdir} have {full} (SequenceConfig)")
        max_len = self.config.data.max_len
        if self.model.generates:
            if dims:
                raise ValueError(f"dims={dims}: model.type={self.config.model.type!r} scores no vectors")
            num_beams = self.config.model.num_beams
            num_items = self.histories.num_items
            return BeamRanker(self.model, params, num_items, max_len, self.mesh, num_beams)
        return SequenceRanker(self.model, params, max_len, self.mesh, layout, dims, self._schema)

    def evaluate(self, ranker: Ranker, part: str, *, quick: bool = False) -> dict:
        """Every metric of one part; `quick` leaves out intervals and sampled protocols."""
        config = self.config.eval
        if quick:
            config = dataclasses.replace(config, bootstrap=0, sampled_negatives=0)
        return evaluate(ranker, self.histories, self.split, part, config, seed=self.config.seed)

    def evaluate_baselines(self, part: str) -> dict[str, dict]:
        """The same evaluation for every baseline, and for the oracle where the data come from a simulator."""
        names = self.config.eval.baselines
        rankers = {name: BASELINES[name](self.histories, self.split) for name in names}
        if self.dataset.world is not None:
            rankers["oracle"] = ScoreRanker(self.dataset.world.oracle(self.histories))
        return {name: self.evaluate(ranker, part) for name, ranker in rankers.items()}


def _laid(array, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _name_users(histories, users: np.ndarray) -> str:
    names = [str(histories.user_ids[user]) for user in users[:10]]
    return "users " + ", ".join(names) + (f" and {len(users) - 10} more" if len(users) > 10 else "")


def write_json(path: pathlib.Path, value) -> None:
    """Writes through a temporary file, so that a killed process leaves the old or the new one.

    Of several processes only the first writes.
    """
    if not processes.is_first():
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)
