"""A run from end to end: config -> data -> model -> training -> test score. The entry points in
`experiments/` are thin wrappers around this class."""

import dataclasses
import functools
import json
import os
import pathlib
from functools import partial

import jax
import numpy as np

from rec_jax import mesh as mesh_lib
from rec_jax import processes
from rec_jax.config import build
from rec_jax.data.datasets import DataConfig, load_dataset
from rec_jax.data.negatives import make_sampler
from rec_jax.data.pipeline import BatchSource, make_iterator
from rec_jax.eval.evaluator import EvalConfig, evaluate
from rec_jax.mesh import MeshConfig
from rec_jax.models.base import define_model, init_model, without_table
from rec_jax.models.baselines import BASELINES
from rec_jax.models.sasrec import SASRec, SASRecConfig
from rec_jax.models.scoring import SequenceScorer
from rec_jax.nn.blocks import tensor_parallel
from rec_jax.nn.layouts import shardings
from rec_jax.nn.parallel import partition
from rec_jax.train import checkpoint
from rec_jax.train.dedupe import DedupingSource
from rec_jax.train.loop import TrainConfig, fit
from rec_jax.train.losses import LossConfig
from rec_jax.train.optim import OptimConfig, make_optimizer
from rec_jax.train.plan import LayoutCost, choose_layout, ids_per_device, layout_costs
from rec_jax.train.state import TrainState
from rec_jax.train.step import init_state, make_catch_up, make_train_step, state_specs
from rec_jax.train.tables import TableConfig, make_item_table
from rec_jax.train.tables import check as check_table
from rec_jax.tree import num_params

MODELS = {"sasrec": SASRec}


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run is made of. Config files start from its defaults."""

    seed: int = 0
    data: DataConfig = DataConfig()
    model: SASRecConfig = SASRecConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    table: TableConfig = TableConfig()

    def __post_init__(self):
        check_table(self.table, self.loss)
        if unknown := set(self.eval.baselines) - set(BASELINES):
            raise ValueError(
                f"baselines={self.eval.baselines}: there is no {', '.join(sorted(unknown))}; use "
                f"{', '.join(BASELINES)} (EvalConfig)"
            )


def model_builder(config: ExperimentConfig, num_items: int):
    """rngs -> the module."""
    build_module = MODELS[config.model.type]
    return lambda rngs: build_module(config.model, num_items, config.data.max_len, rngs=rngs)


def plan_layouts(config: ExperimentConfig, num_items: int, mesh) -> list[LayoutCost]:
    data, model = mesh.shape["data"], mesh.shape["model"]
    num_ids = ids_per_device(config.loss, config.train.batch_rows, config.data.max_len, data)
    return layout_costs(
        config.table, config.optim.type, num_items + 1, config.model.width, num_ids, data, model
    )


class Program:
    """What a config computes on a mesh: the model and its training step, without the data.

    item_counts: int[V + 1] training events of each item, for popularity samplers and hot rows.
    """

    def __init__(self, config: ExperimentConfig, num_items: int, mesh, total_steps: int, item_counts):
        self.config, self.mesh, self._item_counts = config, mesh, item_counts
        self._build = model_builder(config, num_items)
        self.model = define_model(self._build)
        self.layout_costs = plan_layouts(config, num_items, mesh)
        self.layout = choose_layout(config.table, self.layout_costs)
        table = dataclasses.replace(config.table, layout=self.layout)
        self.item_table = make_item_table(table, config.optim, total_steps, item_counts, mesh)
        abstract = self.model.abstract_params
        dense = abstract if self.item_table is None else without_table(abstract)
        self.optimizer = make_optimizer(config.optim, dense, total_steps)
        split = tensor_parallel(config.model.num_heads, config.model.ff_width, mesh.shape["model"])
        self.specs = partition(dense, split, mesh, fully_sharded=config.mesh.fully_sharded)
        self.state_specs = state_specs(abstract, self.optimizer, self.specs, self.item_table)

    @functools.cached_property
    def sampler(self):  # made only where it is used: its tables take seconds for millions of items
        return make_sampler(self.config.loss.sampler, self._item_counts)

    def init_state(self) -> TrainState:
        params = init_model(self._build, self.config.seed)[1]
        return init_state(params, self.optimizer, self.mesh, self.item_table, self.specs)

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of a state; computes nothing."""
        make = partial(init_state, mesh=self.mesh, item_table=self.item_table, specs=self.specs)
        state = jax.eval_shape(lambda params: make(params, self.optimizer), self.model.abstract_params)
        return jax.tree.map(_laid, state, shardings(self.mesh, self.state_specs))

    def abstract_params(self):
        return self.abstract_state().params

    def make_step(self):
        config = self.config
        return make_train_step(
            self.model,
            self.optimizer,
            config.loss,
            self.sampler,
            self.mesh,
            micro_rows=config.train.micro_rows,
            precision=config.train.precision,
            seed=config.seed,
            clip_norm=config.optim.clip_norm,
            item_table=self.item_table,
            specs=self.specs,
            reduce=config.mesh.reduce,
        )

    def prepare(self, source):
        """The source of batches as the step wants them."""
        config = self.config
        if not config.table.host_dedupe:
            return source
        return DedupingSource(source, config.loss, self.sampler, self.item_table, config.seed)

    def make_catch_up(self):
        return make_catch_up(self.item_table, self.mesh, self.state_specs)


class Experiment:
    """A config and its working directory, `workdir`, which holds all that the run reads and writes."""

    def __init__(self, config: ExperimentConfig, workdir):
        self.config, self.workdir = config, pathlib.Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.mesh = mesh_lib.make_mesh(config.mesh)
        processes.check_same("configs", repr(config))
        with processes.first_before_others():
            self.dataset = load_dataset(config.data, self.workdir / "data")
        self.histories, self.split = self.dataset.histories, self.dataset.split
        self.config = config = self._with_layout(config)
        self.model = define_model(model_builder(config, self.histories.num_items))

    def _with_layout(self, config: ExperimentConfig) -> ExperimentConfig:
        """The config with the layout of the table that this run began with, or that the plan chooses: another
        mesh would choose another, whose checkpoints have other arrays."""
        if config.table.layout != "auto":
            return config
        path = self.workdir / "config.json"
        if path.exists():
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
        return (
            f"mesh: data={mesh.shape['data']}, model={mesh.shape['model']} ({platform}); "
            f"table of items: {self.histories.num_items + 1:,} rows x {self.config.model.width}, "
            f"layout {table.layout}, optimizer {table.optimizer}"
        )

    def fit(self):
        """Trains, or goes on where an earlier run in `workdir` stopped. Returns the loop's FitResult."""
        config = self.config
        source = BatchSource(
            self.histories,
            self.split,
            max_len=config.data.max_len,
            batch_rows=config.train.batch_rows,
            epochs=config.train.epochs,
            seed=config.seed,
            all_windows=config.train.all_windows,
            host=jax.process_index(),
            num_hosts=jax.process_count(),
        )
        program = self._program(len(source))
        config_json = dataclasses.asdict(config)
        path = self.workdir / "config.json"
        if not path.exists():
            write_json(path, config_json)
        fitted = fit(
            program.init_state(),
            program.make_step(),
            make_iterator(program.prepare(source)),
            lambda params: self.evaluate(self.scorer(params), "val", quick=True),
            config=config.train,
            steps_per_epoch=source.steps_per_epoch,
            workdir=self.workdir,
            run_info={"config": config_json, "split": self.split.checksum},
            place=lambda batch: mesh_lib.place_batch(batch, self.mesh),
            describe_batch=lambda step: _name_users(self.histories, source.users(step)),
            before_eval=program.make_catch_up(),
        )
        write_json(path, config_json)  # an extended run has other epochs than the file says
        return fitted

    def _program(self, total_steps: int = 1) -> "Program":
        counts = self.split.train_item_counts(self.histories)
        return Program(self.config, self.histories.num_items, self.mesh, total_steps, counts)

    def best_params(self):
        """Parameters of the best validation score, as they lie in training.

        Raises ValueError if the workdir holds no finished evaluation.
        """
        restored = checkpoint.restore_best(self.workdir / "checkpoints", self._program().abstract_params())
        if restored is None:
            raise ValueError(f"{self.workdir} holds no best checkpoint yet: let the training evaluate once")
        return restored.state

    def scorer(self, params) -> SequenceScorer:
        """params: as they lie in training."""
        item_table = self._program().item_table
        return SequenceScorer(
            self.model,
            params,
            self.histories,
            self.config.data.max_len,
            self.mesh,
            item_table and item_table.layout,
        )

    def evaluate(self, score_fn, part: str, *, quick: bool = False) -> dict:
        """Every metric of one part; `quick` leaves out intervals and sampled protocols."""
        config = self.config.eval
        if quick:
            config = dataclasses.replace(config, bootstrap=0, sampled_negatives=0)
        return evaluate(score_fn, self.histories, self.split, part, config, seed=self.config.seed)

    def evaluate_baselines(self, part: str) -> dict[str, dict]:
        """The same evaluation for every baseline, and for the oracle where the data come from a simulator."""
        names = self.config.eval.baselines
        scorers = {name: BASELINES[name](self.histories, self.split) for name in names}
        if self.dataset.world is not None:
            scorers["oracle"] = self.dataset.world.score_fn(self.histories)
        return {name: self.evaluate(score_fn, part) for name, score_fn in scorers.items()}


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
