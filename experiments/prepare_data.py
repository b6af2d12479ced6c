"""Reads, cleans and splits a log of interactions, and writes a directory that training reads.

    python -m experiments.prepare_data --input=log.csv --user=customer --item=product --time=when \\
        --k_core=5 --output=data/log
    python -m experiments.train --config=configs/log.py --workdir=runs/log \\
        --config.data.path=data/log

Prints the format, the number of events that each rule removed, and the split with its checksum. The input is
looked up in the current directory, then in $REC_JAX_DATA. With --audit it also reports how far a benchmark on
these data can be trusted (ties in time, repeated items, leakage, hit rates of simple rules): as text, and as
audit.json and audit.png in the output directory. The input may then be a directory that was prepared before.
"""

import dataclasses
import json
import pathlib

from absl import flags

from experiments.launch import launch

_FORMATS = ("auto", "movielens", "tfds", "sasrec", "sequences", "recbole", "csv", "parquet", "simulator")

flags.DEFINE_string("input", "", "The log: a file, or with --format=tfds a name (movielens/1m-ratings).")
flags.DEFINE_enum(
    "format",
    "auto",
    _FORMATS,
    "auto: detected from the name and the content. movielens: ratings.dat (::), u.data, ratings.csv; sasrec: "
    "`user item` lines; sequences: `user item item ...` lines; recbole: .inter files; csv, parquet: files "
    "with column names; tfds: MovieLens from TensorFlow Datasets; simulator: a simulated log.",
)
flags.DEFINE_string("user", "", "Column of the user; default: a column with a usual name (user_id).")
flags.DEFINE_string("item", "", "Column of the item; default: a column with a usual name (item_id).")
flags.DEFINE_string(
    "time",
    "",
    "Column of the time, with numbers or ISO 8601 dates; default: a column with a usual name (timestamp). "
    "Without such a column, the order of the file is the order in time.",
)
flags.DEFINE_enum("time_unit", "s", ("s", "ms", "us", "ns"), "Unit of numeric times, which count from 1970.")
flags.DEFINE_string("rating", "", "Column of the rating; default: a column named rating.")
flags.DEFINE_list("features", [], "Other columns to keep with the events, separated by commas.")
flags.DEFINE_string("delimiter", "", "Separator of fields, if not the usual one; \\t is a tab.")
flags.DEFINE_string("titles", "", "File with titles: movies.dat, a RecBole .item file, csv or tsv.")
flags.DEFINE_string("titles_ids", "", "File with `item id_in_titles` lines, if items were renumbered.")
flags.DEFINE_float("min_rating", 0.0, "Remove events with a lower rating or without one. 0: off.")
flags.DEFINE_enum(
    "duplicates",
    "keep",
    ("keep", "first", "last"),
    "Which events of the same user with the same item are kept: all, the first or the last in time.",
)
flags.DEFINE_integer("min_item_events", 1, "Remove items with fewer events, once.")
flags.DEFINE_integer("min_user_events", 1, "Then remove users with fewer events, once.")
flags.DEFINE_integer(
    "k_core", 0, "Then remove users and items with fewer events, until none is left. 0: off."
)
flags.DEFINE_enum(
    "split",
    "leave_one_out",
    ("leave_one_out", "global_temporal"),
    "leave_one_out: each user's last event is the test target, the one before it the validation target. "
    "global_temporal: split at two times, the same for all users.",
)
flags.DEFINE_integer(
    "val_time", 0, "global_temporal: first second (UTC) of validation. 0: from val_fraction."
)
flags.DEFINE_integer("test_time", 0, "global_temporal: first second (UTC) of test. 0: from test_fraction.")
flags.DEFINE_float("val_fraction", 0.1, "global_temporal: share of events for validation, before the test.")
flags.DEFINE_float("test_fraction", 0.1, "global_temporal: share of events for test, the latest ones.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write. Training reads it as data.path.")
_AUDIT = flags.DEFINE_bool("audit", False, "Report how far a benchmark on these data can be trusted.")
flags.mark_flag_as_required("output")


def main():
    from rec_jax.config import build
    from rec_jax.data.datasets import DataConfig, prepare_dataset

    values = {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(__name__)}
    values["path"] = values.pop("input")
    output = pathlib.Path(values.pop("output"))
    del values["audit"]
    dataset, _ = prepare_dataset(build(DataConfig, values), output)
    print("\n\n".join(dataset.report))
    if _AUDIT.value:
        write_audit(dataset, output)
    if (output / "prepared.json").exists():  # a directory prepared before is not copied
        print(f"\nwritten to {output}: to train on it, set --config.data.path={output}")


def write_audit(dataset, output: pathlib.Path) -> None:
    from rec_jax.data.audit import FIGURES, audit, format_audit, plot_audit
    from rec_jax.eval.evaluator import EvalConfig, evaluate
    from rec_jax.models.baselines import BASELINES

    histories, split = dataset.histories, dataset.split
    figures = audit(histories, split)
    for name in ("bigram", "popularity"):
        score_fn = BASELINES[name](histories, split)
        metrics = evaluate(score_fn, histories, split, "test", EvalConfig(ks=(1, 10), bootstrap=0))
        figures |= {f"{name}_hit@{k}": metrics[f"hr@{k}"] for k in (1, 10)}
    output.mkdir(parents=True, exist_ok=True)
    plot_audit(histories, split, figures, output / "audit.png")
    described = {name: {"value": x, **dataclasses.asdict(FIGURES[name])} for name, x in figures.items()}
    about = {"split": split.kind, "checksum": split.checksum, "has_times": histories.times is not None}
    (output / "audit.json").write_text(json.dumps({**about, "figures": described}, indent=1))
    print(f"\n{format_audit(histories, split, figures)}\n\nplots: {output / 'audit.png'}")


if __name__ == "__main__":
    launch(main)
