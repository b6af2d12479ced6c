"""A complete run: config -> data -> model -> training -> test scores. The commands in `experiments/` are thin
wrappers around the class `Experiment`."""

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
    """A config and its working directory, `workdir`, which holds all files that the run writes.

    base: parameters of a trained run, for a run that starts from them. dataset, semantic_ids: given if they
    are loaded already.
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
        self._check_columns(MODELS[type(config.model)].columns)  # first, as the constructor may need them
        self.model = define_model(self.builder(config))
        self._check_columns(self.model.columns)

    def _check_columns(self, columns: tuple[str, ...]) -> None:
        if missing := set(columns) - {feature.name for feature in self.dataset.schema}:
            fields = " and ".join(sorted({"data.time" if x == "time" else "data.features" for x in missing}))
            raise ValueError(
                f"model.type={self.config.model.type!r} reads {', '.join(sorted(missing))} of each event, "
                f"but this log has no such column: name it in {fields}, or see the comments in the model's "
                "config on settings that do without"
            )

    def builder(self, config: ExperimentConfig):
        """Returns the function rngs -> module that builds the model of a config for this data set."""
        num_items, max_len = self.histories.num_items, config.data.max_len
        return model_builder(config.model, num_items, max_len, self.semantic_ids, self.dataset.schema)

    def _with_layout(self, config: ExperimentConfig) -> ExperimentConfig:
        """Returns the config with table.layout="auto" replaced: by the layout with which the run in `workdir`
        began, else by the planned one. A resumed run on another mesh must not choose another layout, because
        the arrays in its checkpoints would not match."""
        if config.table.layout != "auto":
            return config
        path = self.workdir / "config.json"
        if not path.exists():
            return with_layout(config, self.histories.num_items, self.mesh)
        layout = json.loads(path.read_text())["table"]["layout"]
        return dataclasses.replace(config, table=dataclasses.replace(config.table, layout=layout))

    @classmethod
    def open(cls, workdir, overrides: dict | None = None) -> "Experiment":
        """Opens the run that was trained in `workdir`, with the split on which it was trained.

        overrides: changes to its config, {"eval.ks": (10, 50)}. If there are fewer devices than the run had,
        the mesh is made of all devices present.

        Raises ValueError if there is no trained model, or if the split on disk is missing or a different one.
        """
        trained = TrainedModel.load(workdir)
        try:
            cfg = to_config_dict(build(ExperimentConfig, trained.config))
        except ValueError as error:
            raise ValueError(f"{workdir} was {OTHER_VERSION} ({error})") from error
        override(ExperimentConfig, cfg, overrides or {})
        config = build(ExperimentConfig, cfg)
        if config.mesh.data * config.mesh.model > jax.device_count():
            print(
                f"mesh: the run was trained with {config.mesh}, but there are only {jax.device_count()} "
                "devices: using all of them along data",
                flush=True,
            )
            config = dataclasses.replace(config, mesh=mesh_lib.MeshConfig())
        return cls(config, workdir, dataset=trained.dataset(), semantic_ids=trained.semantic_ids)

    @property
    def trained(self) -> TrainedModel:
        """The trained model that is on disk now: the best one so far, or the result of a compression."""
        return TrainedModel.load(self.workdir)

    @functools.cached_property
    def num_params(self) -> int:
        return num_params(self.model.abstract_params)

    def describe(self) -> str:
        """Returns lines on the mesh, the item embedding table or the semantic ids, and on features of the log
        that the model does not read."""
        mesh, table = self.mesh, self.config.table
        platform = mesh.devices.flat[0].platform
        text = f"mesh: data={mesh.shape['data']}, model={mesh.shape['model']} ({platform})"
        if self.semantic_ids:
            text += f"\n{self.semantic_ids.report}"
        else:
            text += (
                f"; item embedding table: {self.histories.num_items + 1:,} entries x "
                f"{self.config.model.table_dim} dims, layout {table.layout}, optimizer {table.optimizer}"
            )
        if unread := [name for name in self.config.data.features if name not in self.model.columns]:
            text += (
                f"\nnote: model.type={self.config.model.type!r} does not read the features "
                f"{', '.join(unread)}: they have no effect on it (docs/extending.md)"
            )
        return text

    @property
    def _schema(self):
        """The features that the model reads."""
        return tuple(feature for feature in self.dataset.schema if feature.name in self.model.columns)

    def batch_source(self) -> BatchSource:
        """Returns the batches of all epochs, of each the part that this process feeds."""
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
        """Trains, or resumes a training that stopped in `workdir`. Each new best evaluation stores a version
        of the trained model. Returns the loop's FitResult.

        with_users: see `trained.save`. Raises ValueError if another process is training in `workdir`.
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
            if (number := record["step"]) not in saved:
                self.save_model(_plain(step, params), number, with_users)
                saved.add(number)

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
        write_json(path, config_json)  # train.epochs may have grown since the file was written
        return fitted

    def save_model(self, params, step: int, with_users: bool = True) -> None:
        """Stores a new version of the trained model and makes it the current one."""
        config = dataclasses.asdict(self.config)
        save_trained(self.workdir, params, step, config, self.dataset, self.semantic_ids, with_users)

    def step(self, total_steps: int = 1, teachers=None) -> TrainStep:
        """Returns the training step.

        total_steps: length of the training, for schedules. teachers: required for training if the config
        names some; None if the step is not used for training.
        """
        config = self.config
        if teachers is None:
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
        """The parameters that a training starts from: `base` if given, else drawn with config.seed."""
        return (
            init_model(self.builder(self.config), self.config.seed)[1] if self._base is None else self._base
        )

    def _run_info(self) -> dict:
        """The description of the run, stored with checkpoints and compared when the run resumes."""
        info = {
            "config": dataclasses.asdict(self.config),
            "split": self.split.checksum,
            "vocabulary": self.histories.vocabulary,
            "columns": self.histories.column_digests,
        }
        return info if self.semantic_ids is None else info | {"semantic_ids": self.semantic_ids.digest}

    @functools.cached_property
    def _neighbours(self):
        """The nearest items of each item, or None if no augmentation substitutes items."""
        config = self.config
        sections = [config.augment]
        if config.contrastive.augments:
            sections.append(config.contrastive.augment)
        nums = [section.num_neighbours for section in sections if section.substitute]
        return nearest_items(self.histories, self.split, max(nums)) if nums else None

    def _teachers(self) -> list:
        """Returns [(model, params)] of the runs in compress.distill.teachers.

        Raises ValueError for a teacher that was trained on another split, that reads shorter histories than
        this run, or that predicts something else.
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
                    f"teachers={workdir} reads data.max_len={teacher.max_len} events, this run "
                    f"{self.config.data.max_len}: lower data.max_len to {teacher.max_len} (DistillConfig)"
                )
            if teacher.model.is_causal != self.model.is_causal or teacher.model.is_generative:
                raise ValueError(
                    f"teachers={workdir} has model.type={teacher.model_config.type!r}, which cannot teach "
                    f"{self.config.model.type!r}: choose a teacher that has item vectors and that predicts "
                    "the same as this model, either the next item or masked items (DistillConfig)"
                )
            teachers.append((teacher.model, replicate(dequantize_params(teacher.params), self.mesh)))
        return teachers

    def ranker(self, params) -> Ranker:
        """Returns the ranker of this model. params: placed as in training."""
        step = self.step()
        return self.plain_ranker(step.objective.final(params), step.tables)

    def plain_ranker(self, params, tables: Tables | None = None) -> Ranker:
        """Returns the ranker of this model for parameters in the form that the model takes.

        tables: the tables that are not plain parameters, if any.
        """
        sizes, schema = (self.histories.num_items, self.config.data.max_len), self.dataset.schema
        return make_ranker(self.model, params, *sizes, self.mesh, schema=schema, tables=tables)

    def evaluate(self, ranker: Ranker, part: str, *, quick: bool = False) -> dict:
        """Returns every metric of one part, "val" or "test". quick: no intervals, no sampled protocol."""
        config = self.config.eval
        if quick:
            config = dataclasses.replace(config, bootstrap=0, sampled_negatives=0)
        return evaluate(ranker, self.histories, self.split, part, config, seed=self.config.seed)

    def evaluate_baselines(self, part: str) -> dict[str, dict]:
        """Returns {name: metrics} of every baseline, and of the oracle if the data are simulated."""
        names = self.config.eval.baselines
        rankers = {name: BASELINES[name](self.histories, self.split) for name in names}
        if self.dataset.world is not None:
            rankers["oracle"] = ScoreRanker(self.dataset.world.oracle(self.histories))
        return {name: self.evaluate(ranker, part) for name, ranker in rankers.items()}


def _plain(step: TrainStep, params) -> dict:
    """Converts parameters from their form in training to the form that the model takes; a row-sharded table
    becomes a ShardedTable."""
    for table in step.tables.tables.values():
        if table.placement:
            params, array = pop_leaf(params, table.path)
            params = with_leaf(params, table.path, ShardedTable(array, table.placement))
    return step.objective.merged(params)


def _name_users(histories, users: np.ndarray) -> str:
    names = [str(histories.user_ids[user]) for user in users[:10]]
    return "users " + ", ".join(names) + (f" and {len(users) - 10} more" if len(users) > 10 else "")


def write_json(path: pathlib.Path, value) -> None:
    """Writes JSON through a temporary file, so that a killed process leaves either the old or the new file.

    If there are several processes, only the first one writes.
    """
    if not processes.is_first():
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)
