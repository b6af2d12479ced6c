"""A run from end to end: config -> data -> model -> training -> test score. The entry points in
`experiments/` are thin wrappers around this class."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib

import jax
import numpy as np

from rec_jax import mesh as mesh_lib
from rec_jax import processes
from rec_jax.compress.prune import last_rewind
from rec_jax.compress.quant import dequantize_params
from rec_jax.compress.training import first_share_in_force
from rec_jax.config import build, override, to_config_dict
from rec_jax.data.datasets import load_dataset
from rec_jax.data.pipeline import BatchSource, EpochPlan, make_iterator
from rec_jax.eval.evaluator import check_eval, evaluate
from rec_jax.mesh import replicate
from rec_jax.models.base import define_model, init_model
from rec_jax.models.baselines import BASELINES, nearest_items
from rec_jax.models.ranker import Ranker, ScoreRanker
from rec_jax.models.registry import MODELS, model_builder
from rec_jax.models.scoring import make_ranker
from rec_jax.models.semantic_ids import load_semantic_ids
from rec_jax.objectives.distill import DistillConfig
from rec_jax.run_config import ExperimentConfig
from rec_jax.tables.tables import Tables
from rec_jax.train.loop import TrainingData, Validation, fit
from rec_jax.train.optim import make_schedule
from rec_jax.train.step import TrainStep
from rec_jax.trained import ShardedTable, TrainedModel
from rec_jax.trained import save as save_trained
from rec_jax.training import make_step, with_layout
from rec_jax.tree import num_params, pop_leaf, with_leaf
from rec_jax.versions import OTHER_VERSION
from rec_jax.workdir import training_lock


class Experiment:
    """A config and its working directory, `workdir`, which holds all that the run reads and writes.

    base: parameters of a trained run, for a run that starts from them. dataset, semantic_ids: if they are loaded
    already.
    """

    def __init__(self, config: ExperimentConfig, workdir, base=None, dataset=None, semantic_ids=None):
        self.config, self.workdir, self._base = config, pathlib.Path(workdir), base
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.mesh = mesh_lib.make_mesh(config.mesh)
        processes.check_same("configs", repr(config))
        with processes.first_before_others():
            is_used = any((self.workdir / "checkpoints").glob("[bl]*/[0-9]*"))
            self.dataset = dataset or load_dataset(config.data, self.workdir / "data", is_used=is_used)
        self.histories, self.split = self.dataset.histories, self.dataset.split
        self.config = config = self._with_layout(config)
        self.semantic_ids = semantic_ids
        if semantic_ids is None and MODELS[type(config.model)].is_generative:
            self.semantic_ids = load_semantic_ids(
                config.semantic_ids, config.data, self.dataset, self.workdir, config.seed
            )
        self._check_columns(MODELS[type(config.model)].columns)  # a constructor may need them
        self.model = define_model(self.builder(config))
        self._check_columns(self.model.columns)

    def _check_columns(self, columns: tuple[str, ...]) -> None:
        if missing := set(columns) - {feature.name for feature in self.dataset.schema}:
            fields = " and ".join(sorted({"data.time" if x == "time" else "data.features" for x in missing}))
            raise ValueError(
                f"model.type={self.config.model.type!r} reads {', '.join(sorted(missing))} of each event, "
                f"and this log has none: name the column by {fields}, or see how its config does without"
            )

    def builder(self, config: ExperimentConfig):
        """rngs -> the module of a config on this data set."""
        num_items, max_len = self.histories.num_items, config.data.max_len
        return model_builder(config.model, num_items, max_len, self.semantic_ids, self.dataset.schema)

    def _with_layout(self, config: ExperimentConfig) -> ExperimentConfig:
        """The config with the layout of the table that this run began with, or that the plan chooses: another
        mesh would choose another, whose checkpoints have other arrays."""
        if config.table.layout != "auto":
            return config
        path = self.workdir / "config.json"
        if not path.exists():
            return with_layout(config, self.histories.num_items, self.mesh)
        layout = json.loads(path.read_text())["table"]["layout"]
        return dataclasses.replace(config, table=dataclasses.replace(config.table, layout=layout))

    @classmethod
    def open(cls, workdir, overrides: dict | None = None) -> "Experiment":
        """The experiment that was trained in `workdir`, on the split that it was trained on.

        overrides: changes to its config, {"eval.ks": (10, 50)}. Where there are fewer devices than the run
        had, it takes those there are.

        Raises ValueError if there is no trained model, or its split is missing or another one.
        """
        trained = TrainedModel.load(workdir)
        try:
            cfg = to_config_dict(build(ExperimentConfig, trained.config))
        except ValueError as error:
            raise ValueError(f"{workdir} was {OTHER_VERSION} ({error})") from error
        override(ExperimentConfig, cfg, overrides or {})
        config = build(ExperimentConfig, cfg)
        if config.mesh.data * config.mesh.model > jax.device_count():
            print(f"mesh: the run had {config.mesh}, here are {jax.device_count()} devices", flush=True)
            config = dataclasses.replace(config, mesh=mesh_lib.MeshConfig())
        return cls(config, workdir, dataset=trained.dataset(), semantic_ids=trained.semantic_ids)

    @property
    def trained(self) -> TrainedModel:
        """The best model so far, or what a compression stored, as it is on the disk now."""
        return TrainedModel.load(self.workdir)

    @functools.cached_property
    def num_params(self) -> int:
        return num_params(self.model.abstract_params)

    def describe(self) -> str:
        """The mesh, and how the item embedding table is placed on it and learns."""
        mesh, table = self.mesh, self.config.table
        platform = mesh.devices.flat[0].platform
        placed = f"mesh: data={mesh.shape['data']}, model={mesh.shape['model']} ({platform})"
        if self.semantic_ids:
            return f"{placed}\n{self.semantic_ids.report}"
        return (
            f"{placed}; item embedding table: {self.histories.num_items + 1:,} rows x "
            f"{self.config.model.table_dim}, layout {table.layout}, optimizer {table.optimizer}"
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
            EpochPlan(
                config.data.max_len,
                config.train.batch_rows,
                config.train.epochs,
                config.seed,
                config.train.all_windows,
            ),
            is_causal=self.model.is_causal,
            schema=self._schema,
            host=jax.process_index(),
            num_hosts=jax.process_count(),
        )

    def fit(self, with_users: bool = True):
        """Trains, or resumes where an earlier session in `workdir` stopped. Every best evaluation becomes a
        version of the trained model. Returns the loop's FitResult.

        with_users: see `trained.save`. Raises ValueError if another process trains there.
        """
        with training_lock(self.workdir) if processes.is_first() else contextlib.nullcontext():
            return self._fit(with_users)

    def _fit(self, with_users: bool):
        check_eval(self.config.eval, self.histories, self.split, self.config.seed)
        config, source = self.config, self.batch_source()
        step = self.step(len(source), self._teachers())
        config_json = dataclasses.asdict(config)
        path = self.workdir / "config.json"
        if not path.exists():
            write_json(path, config_json)
        rate = make_schedule(config.optim, len(source))
        saved = set()

        def save_best(params, record):
            if (at := record["step"]) not in saved:
                self.save_model(_plain(step, params), at, with_users)
                saved.add(at)

        fitted = fit(
            step.init(self.first_params()),
            step,
            TrainingData(
                make_iterator(source),
                source.steps_per_epoch,
                place=lambda batch: mesh_lib.place_batch(batch, self.mesh),
                describe=lambda step: _name_users(self.histories, source.users(step)),
            ),
            Validation(
                lambda params: self.evaluate(self.ranker(params), "val", quick=True),
                prepare=step.catch_up,
                begin=first_share_in_force(config.compress),
            ),
            config=config.train,
            workdir=self.workdir,
            run_info=self._run_info(),
            learning_rate=lambda step: rate(step - last_rewind(config.compress.prune, len(source), step)),
            on_best=save_best,
        )
        write_json(path, config_json)  # an extended run has other epochs than the file says
        return fitted

    def save_model(self, params, step: int, with_users: bool = True) -> None:
        """Puts a new version of the trained model in force."""
        config = dataclasses.asdict(self.config)
        save_trained(self.workdir, params, step, config, self.dataset, self.semantic_ids, with_users)

    def step(self, total_steps: int = 1, teachers=None) -> TrainStep:
        """teachers: needed to train, where the config has some."""
        config = self.config
        if teachers is None:  # nothing is to be trained
            compress = dataclasses.replace(config.compress, distill=DistillConfig())
            config = dataclasses.replace(config, compress=compress)
        return make_step(
            config,
            self.model,
            self.split.train_item_counts(self.histories),
            self.mesh,
            total_steps=total_steps,
            teachers=teachers or (),
            base=self._base,
            neighbours_VK=self._neighbours,
        )

    def first_params(self):
        """What a training starts from: given parameters of the model, or those drawn by the seed."""
        return (
            init_model(self.builder(self.config), self.config.seed)[1] if self._base is None else self._base
        )

    def _run_info(self) -> dict:
        """What must be the same when the run resumes."""
        info = {
            "config": dataclasses.asdict(self.config),
            "split": self.split.checksum,
            "vocabulary": self.histories.vocabulary,
            "columns": self.histories.column_digests,
        }
        return info if self.semantic_ids is None else info | {"semantic_ids": self.semantic_ids.digest}

    @functools.cached_property
    def _neighbours(self):
        """The nearest items of each, where training substitutes them."""
        config = self.config
        asking = [config.augment]
        if config.contrastive.augments:
            asking.append(config.contrastive.augment)
        nums = [section.num_neighbours for section in asking if section.substitute]
        return nearest_items(self.histories, self.split, max(nums)) if nums else None

    def _teachers(self) -> list:
        """[(model, params)] of compress.distill.teachers.

        Raises ValueError for one that was trained on another split or cannot read histories as long.
        """
        teachers = []
        for workdir in self.config.compress.distill.teachers:
            teacher = TrainedModel.load(workdir)
            try:
                teacher.check_data(self.dataset)
            except ValueError as error:
                raise ValueError(f"teachers={workdir}: {error} (DistillConfig)") from error
            if teacher.max_len < self.config.data.max_len:
                raise ValueError(
                    f"teachers={workdir}: it reads data.max_len={teacher.max_len} events, this run "
                    f"{self.config.data.max_len}: set data.max_len to as many at most (DistillConfig)"
                )
            if teacher.model.is_causal != self.model.is_causal or teacher.model.is_generative:
                raise ValueError(
                    f"teachers={workdir}: a model that predicts the next item learns from another such, one "
                    f"that predicts masked items from another such, and one without item vectors from none "
                    f"({teacher.model_config.type} teaches {self.config.model.type}) (DistillConfig)"
                )
            teachers.append((teacher.model, replicate(dequantize_params(teacher.params), self.mesh)))
        return teachers

    def ranker(self, params) -> Ranker:
        """params: as they are placed in training."""
        step = self.step()
        return self.plain_ranker(step.objective.final(params), step.tables)

    def plain_ranker(self, params, tables: Tables | None = None) -> Ranker:
        """params: as the model takes them; tables: those that are not parameters like any other."""
        sizes, schema = (self.histories.num_items, self.config.data.max_len), self.dataset.schema
        return make_ranker(self.model, params, *sizes, self.mesh, schema=schema, tables=tables)

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


def _plain(step: TrainStep, params) -> dict:
    """Parameters of a training as the model takes them; a row-sharded table stays one, as a ShardedTable."""
    for table in step.tables.tables.values():
        if table.placement:
            params, array = pop_leaf(params, table.path)
            params = with_leaf(params, table.path, ShardedTable(array, table.placement))
    return step.objective.merged(params)


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
