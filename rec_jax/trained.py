"""A trained model on disk, in workdir/model/. Evaluation, recommendation, compression, teachers and ensembles
read it and nothing else of a run, except for the split. `rec_jax.versions` defines the files.

It holds parameters in the order of ids, item ids and titles, training counts of the items, the last events of
each user, the semantic ids if the model has some, the config, and the checksums of the split and of the
vocabulary.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax import versions
from rec_jax.config import build
from rec_jax.data.schema import Feature, Schema
from rec_jax.data.strings import Strings
from rec_jax.data.user_histories import UserHistories, last_events
from rec_jax.tree import pop_leaf, with_leaf

FOLDER = "model"
_CHUNK_BYTES = 2**26  # how much of a sharded table is on the host at once
_USER_COLUMNS = ("offsets", "items", "times", "seen_offsets", "seen_items")


@dataclass(frozen=True)
class ShardedTable:
    """A row-sharded leaf of the parameters. `placement`, a `tables.exchange.Placement`, maps ids to rows."""

    array: jax.Array
    placement: object

    def chunks(self):
        """Yields blocks of entries on the host, in the order of ids: a whole copy might not fit there."""
        num_rows, row_bytes = self.placement.num_rows, self.array[:1].nbytes
        size = min(num_rows, max(1, _CHUNK_BYTES // row_bytes))
        replicated = jax.sharding.NamedSharding(self.array.sharding.mesh, jax.sharding.PartitionSpec())
        gather = jax.jit(lambda array, row_ids: array.at[row_ids].get(), out_shardings=replicated)
        for first in range(0, num_rows, size):
            ids = np.minimum(np.arange(first, first + size), num_rows - 1)  # one shape, compiled once
            yield np.asarray(gather(self.array, self.placement.to_physical(ids)))[: num_rows - first]


def save(
    workdir, params, step: int, config: dict, dataset, semantic_ids=None, with_users: bool = True
) -> None:
    """Writes a version and makes it the current one. All processes must call it.

    Args:
      params: nested dict in the form that the model takes. Its leaves are arrays (sharded or not), quantized
        parameters, or ShardedTable.
      step: training step of the parameters.
      config: config of the run, JSON-serialisable.
      dataset: `data.datasets.Dataset`, for ids, titles, training counts and histories.
      semantic_ids: those of the items, if the model has some.
      with_users: keep the users' ids and last events, so that the model can recommend to them by id.
    """
    from rec_jax.compress.quant import pack_leaf

    root = Path(workdir).absolute() / FOLDER
    before, writer, stored = versions.current(root), versions.Writer(root), {}
    for name, leaf in _flatten(params).items():
        stem = "params." + name.replace("/", ".").replace("#", "")
        if isinstance(leaf, ShardedTable):
            parts = {"array": writer.chunked(stem, leaf.placement.num_rows, leaf.chunks())}
            stored[name] = {"kind": "array", "parts": parts, "meta": {}}
            continue
        kind, parts, meta = pack_leaf(leaf)
        entries = {part: writer.array(f"{stem}.{part}", array, pack=True) for part, array in parts.items()}
        stored[name] = {"kind": kind, "parts": entries, "meta": meta}
    sources = {
        "split": dataset.split.checksum,
        "vocabulary": dataset.histories.vocabulary,
        "columns": dataset.histories.column_digests,
        "semantic_ids": None if semantic_ids is None else semantic_ids.digest,
        "max_len": config["data"]["max_len"],
        "context": [feature.name for feature in dataset.schema if not feature.is_outcome],
        "with_users": with_users,
    }
    if before and before[1]["made_of"] == sources:  # so in all versions of a run but the first
        catalogue = before[1]["catalogue"]
        writer.link(catalogue, *before)
    else:
        catalogue = _write_catalogue(writer, dataset, semantic_ids)
        if with_users:
            catalogue["users"] = _write_users(writer, last_events(dataset.histories, sources["max_len"]))
    about = {"step": step, "config": config, "made_of": sources, "params": stored, "catalogue": catalogue}
    writer.publish(about)


def _write_catalogue(writer: versions.Writer, dataset, semantic_ids) -> dict:
    histories, titles = dataset.histories, dataset.histories.titles
    entries = {
        "item_ids": writer.strings("item_ids", histories.item_ids),
        "titles": writer.strings("titles", (titles[x] if x in titles else "" for x in histories.item_ids)),
        "train_counts": writer.array("train_counts", dataset.split.train_item_counts(histories)),
        "schema": [dataclasses.asdict(feature) for feature in dataset.schema],
    }
    if semantic_ids is not None:
        entries["semantic_ids"] = writer.array("semantic_ids", semantic_ids.codes_VQ)
        entries |= {"codebook_size": semantic_ids.codebook_size, "semantic_ids_report": semantic_ids.report}
    return entries


def _write_users(writer: versions.Writer, users: UserHistories) -> dict:
    columns = {name: getattr(users, name) for name in _USER_COLUMNS}
    entries = {name: writer.array(f"users.{name}", x) for name, x in columns.items() if x is not None}
    features = enumerate(users.features.items())
    entries["features"] = {name: writer.array(f"users.feature{n}", x) for n, (name, x) in features}
    return entries | {"ids": writer.strings("users.ids", users.ids)}


@dataclass(frozen=True)
class TrainedModel:
    """A version of a trained model, read from disk.

    workdir: directory of the run. folder: directory of the version. about: content of its about.json.
    """

    workdir: Path
    folder: Path
    about: dict

    @classmethod
    def load(cls, workdir) -> "TrainedModel":
        """Loads the model of a run and verifies the checksums of all its files.

        Raises ValueError if there is no model, if no version is intact, or if another version of rec_jax
        wrote it.
        """
        workdir = Path(workdir)
        root = workdir / FOLDER
        if versions.exists(root):
            try:
                return cls(workdir, *versions.newest(root))
            except versions.DamagedError as error:
                raise ValueError(
                    f"{error}: run the command that made {workdir} once more; it writes the model again from "
                    "the best checkpoint"
                ) from error
        if (workdir / "config.json").exists():
            raise ValueError(
                f"{workdir} holds no trained model yet ({root} is missing): let the training run until its "
                f"first evaluation. Or {workdir} was {versions.OTHER_VERSION}"
            )
        raise ValueError(f"--workdir={workdir} holds no run ({root} is missing): train one there first")

    @property
    def step(self) -> int:
        return self.about["step"]

    @property
    def config(self) -> dict:
        """The config of the run, as in config.json."""
        return self.about["config"]

    @property
    def split(self) -> str:
        """Checksum of the split."""
        return self.about["made_of"]["split"]

    @property
    def vocabulary(self) -> str:
        """Digest of the item ids and their order."""
        return self.about["made_of"]["vocabulary"]

    @property
    def max_len(self) -> int:
        return self.config["data"]["max_len"]

    @property
    def num_items(self) -> int:
        return len(self.item_ids) - 1

    @property
    def is_quantized(self) -> bool:
        return any(entry["kind"] != "array" for entry in self.about["params"].values())

    @property
    def param_bytes(self) -> int:
        """Size of the files of the parameters."""
        return sum(size for name, (size, _) in self.about["files"].items() if name.startswith("params."))

    @cached_property
    def model_config(self):
        from rec_jax.models.registry import MODELS

        section, classes = self.config["model"], {cls.type: cls for cls in MODELS}
        try:
            return build(classes[section["type"]], section, "model")
        except (KeyError, ValueError) as error:
            raise ValueError(f"{self.workdir} was {versions.OTHER_VERSION} ({error})") from error

    @cached_property
    def model(self):
        """The definition of the model, without parameters, a `models.base.Model`."""
        from rec_jax.models.base import define_model
        from rec_jax.models.registry import model_builder

        sizes = self.num_items, self.max_len
        return define_model(model_builder(self.model_config, *sizes, self.semantic_ids, self.schema))

    @cached_property
    def params(self) -> dict:
        """The parameters in the form that the model takes; plain arrays are memory maps."""
        params = {}
        for name, entry in self.about["params"].items():
            parts = {part: self._array(stored) for part, stored in entry["parts"].items()}
            if entry["kind"] == "array":
                leaf = parts["array"]
            else:
                from rec_jax.compress.quant import unpack_leaf

                parts = {part: jnp.asarray(array) for part, array in parts.items()}
                leaf = unpack_leaf(entry["kind"], parts, entry["meta"])
            _put(params, name, leaf)
        return params

    @cached_property
    def item_ids(self) -> Strings:
        """Strings[V + 1]; the first, of the padding, is ""."""
        return versions.read_strings(self.folder, self.about["catalogue"]["item_ids"])

    @cached_property
    def titles(self) -> Strings:
        """Strings[V + 1]; "" if the title is unknown."""
        return versions.read_strings(self.folder, self.about["catalogue"]["titles"])

    @cached_property
    def train_counts(self) -> np.ndarray:
        """int64[V + 1]: training events of each item."""
        return self._array(self.about["catalogue"]["train_counts"])

    @cached_property
    def schema(self) -> Schema:
        """The features of the log, with their normalisation."""
        sections = self.about["catalogue"]["schema"]
        return tuple(Feature(**section | {"values": tuple(section["values"])}) for section in sections)

    @cached_property
    def semantic_ids(self):
        """`models.semantic_ids.SemanticIds`, or None."""
        entries = self.about["catalogue"]
        if "semantic_ids" not in entries:
            return None
        from rec_jax.models.semantic_ids import SemanticIds

        return SemanticIds(
            self._array(entries["semantic_ids"]), entries["codebook_size"], entries["semantic_ids_report"]
        )

    @cached_property
    def users(self) -> UserHistories:
        """The last events of each user. Raises ValueError if the run did not keep them."""
        if "users" not in self.about["catalogue"]:
            raise ValueError(
                f"{self.workdir} was trained without keeping users (--nokeep_users): give a history instead"
            )
        entries = self.about["catalogue"]["users"]
        columns = {name: self._array(entries[name]) if name in entries else None for name in _USER_COLUMNS}
        features = {name: self._array(entry) for name, entry in entries["features"].items()}
        return UserHistories(versions.read_strings(self.folder, entries["ids"]), features=features, **columns)

    def _array(self, entry: dict) -> np.ndarray:
        return versions.read_array(self.folder, entry)

    def dataset(self):
        """Loads the prepared split on which the run was trained (`data.datasets.Dataset`).

        Raises ValueError if it is missing or a different one.
        """
        from rec_jax.data.datasets import DataConfig, load_prepared

        dataset = load_prepared(build(DataConfig, self.config["data"], "data"), self.workdir / "data")
        self.check_data(dataset)
        return dataset

    def check_data(self, dataset) -> None:
        """Raises ValueError unless `dataset` has the split, the item ids and (of the columns that the model
        reads) the values with which the model was trained."""
        histories = dataset.histories
        pairs = {
            "split checksum": (self.split, dataset.split.checksum),
            "vocabulary": (self.vocabulary, histories.vocabulary),
        }
        columns, theirs = self.about["made_of"]["columns"], histories.column_digests
        for name in self.model.columns:
            pairs[f"column {name}"] = columns[name], theirs[name] if name in theirs else "(missing)"
        for name, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise ValueError(
                    f"{self.workdir} was trained on {name} {ours}, but these data have {name} {theirs} "
                    f"({histories.num_items:,} items, {histories.num_events:,} events): restore the data of "
                    "the training, or train again in another workdir"
                )

    def ranker(self, mesh=None, dims: int = 0, num_beams: int = 0):
        """Returns the `models.ranker.ScoreRanker` of this model.

        mesh: None = only the first device. dims: score by the first `dims` dims of the vectors; 0 = all.
        num_beams: width of the beam search; 0 = model.num_beams.

        Raises ValueError if `dims` exceeds the dims of the vectors.
        """
        from rec_jax.mesh import MeshConfig, make_mesh
        from rec_jax.models.scoring import make_ranker

        mesh = mesh or make_mesh(MeshConfig(data=1))
        params, tables = self._params_on(mesh)
        options = {"tables": tables, "dims": dims, "num_beams": num_beams, "schema": self.schema}
        return make_ranker(self.model, params, self.num_items, self.max_len, mesh, **options)

    def _params_on(self, mesh) -> tuple:
        """Returns (parameters, Tables or None) as the training evaluated them: fake-quantized after
        quantization-aware training, and with the table row-sharded if the mesh has several devices."""
        params, config = self.params, self.config
        if config["compress"]["quant"]["aware"] and not self.is_quantized:
            from rec_jax.compress.quant import QuantConfig, fake_quantize_params

            quant = build(QuantConfig, config["compress"]["quant"])
            params = fake_quantize_params(jax.tree.map(jnp.asarray, params), quant)
        if config["table"]["layout"] != "rows" or mesh.size == 1 or "items" not in self.model.tables:
            return params, None
        from rec_jax.tables.layouts import RowSharded
        from rec_jax.tables.tables import Table, Tables

        path, layout = self.model.tables["items"], RowSharded(self.num_items + 1, mesh)
        dense, array = pop_leaf(params, path)
        return with_leaf(dense, path, layout.place(array)), Tables({"items": Table(path, layout, None)})


def check_same_split(models: list[TrainedModel]) -> None:
    """Raises ValueError for models of different splits: one may have been trained on the other's test
    targets."""
    first, *others = models
    for other in others:
        for name in ("split", "vocabulary"):
            ours, theirs = getattr(first, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"--workdir: {other.workdir} was trained on {name} {theirs}, {first.workdir} on {name} "
                    f"{ours}: name only runs of one split"
                )


def check_ensemble(models: list[TrainedModel]) -> None:
    """Raises ValueError for models that cannot form an ensemble: models of different splits, or models that
    do not score every item."""
    check_same_split(models)
    for model in models if len(models) > 1 else ():
        if model.model.is_generative:
            raise ValueError(
                f"--workdir: {model.workdir} (model.type={model.model_config.type!r}) scores only the items "
                "that its beam search finds, so its scores cannot be averaged with others: leave it out"
            )


def _flatten(tree, prefix="") -> dict:
    """Returns {"blocks/#0/ff/up/kernel": leaf}; # marks integer keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves = {}
    for key, value in tree.items():
        text = f"#{key}" if isinstance(key, int) else key
        leaves |= _flatten(value, f"{prefix}/{text}" if prefix else text)
    return leaves


def _put(tree: dict, name: str, leaf) -> None:
    *groups, last = (int(key[1:]) if key[0] == "#" else key for key in name.split("/"))
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[last] = leaf
