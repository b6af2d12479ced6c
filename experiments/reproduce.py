"""Trains the models of a table with several seeds and compares them with published numbers.

    python -m experiments.reproduce --table=ml1m --models=sasrec,bert4rec --seeds=3 --output=runs/ml1m_table

Runs are kept in OUTPUT/runs/MODEL-SEED. Run the same command again to resume it: it trains only the missing
runs. After every run, the finished runs are written to table.md, table.json and table.png.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags

from experiments.launch import launch


@dataclass(frozen=True)
class Row:
    """A config, and the HR@10 and NDCG@10 published for its model; None if there is none."""

    config: str  # NAME, or NAME:VARIANT
    hr: float | None = None
    ndcg: float | None = None
    source: str = ""


_SURVEY = "eSASRec study (github.com/blondered/transformer_benchmark)"
_QUOTED = "Klenitskiy & Vasilev, RecSys'23, as quoted by generative-recommenders"
_AUTHORS = "github.com/facebookresearch/generative-recommenders, without a validation part"
TABLES = {
    "ml1m": {
        "gru4rec": Row("gru4rec_ml1m", 0.2811, 0.1648, _QUOTED),
        "bert4rec": Row("bert4rec_ml1m", 0.2843, 0.1537, _QUOTED),
        "sasrec": Row("sasrec_ml1m", 0.3152, None, "Klenitskiy & Vasilev, RecSys'23 (arXiv 2309.07602)"),
        "gsasrec": Row("gsasrec_ml1m", 0.3003, 0.1726, "github.com/asash/gSASRec-pytorch"),
        "esasrec": Row("esasrec_ml1m", 0.3133, 0.1772, _SURVEY),
        "lru": Row("lru_ml1m"),
        "moe": Row("sasrec_moe_ml1m"),
        "hstu": Row("hstu_ml1m", 0.3037, 0.1719, _SURVEY),
        "hstu_large": Row("hstu_large_ml1m", 0.3294, 0.1893, _AUTHORS),
    },
    "beauty": {
        "sasrec": Row("sasrec_beauty", 0.0921, 0.0531, _SURVEY),
        "tiger": Row("tiger_beauty", 0.0648, 0.0384, "TIGER, NeurIPS'23 (arXiv 2305.05065)"),
    },
    # No numbers are published for this protocol.
    "ml100k": {
        name: Row(f"ml100k:{name}")
        for name in ("gru4rec", "bert4rec", "sasrec", "esasrec", "lru", "hstu", "tiger")
    },
}

_KEYS = ("hr@10", "ndcg@10")

_TABLE = flags.DEFINE_enum("table", None, list(TABLES), "The table to reproduce.")
_MODELS = flags.DEFINE_list("models", None, "Models of the table, separated by commas. Default: all.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds per model (seeds 0, 1, ...).", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the runs and the table.")
_SMOKE = flags.DEFINE_bool(
    "smoke", False, "Train the small smoke variants on simulated data, which takes seconds per run."
)
flags.mark_flags_as_required(["table", "output"])


def main():
    table = TABLES[_TABLE.value]
    names = _MODELS.value or list(table)
    if unknown := set(names) - set(table):
        raise ValueError(
            f"--models={','.join(names)}: --table={_TABLE.value} has no {', '.join(sorted(unknown))}: choose "
            f"from {', '.join(table)}"
        )
    output = Path(_OUTPUT.value)
    jobs = [
        (name, seed) for seed in range(_SEEDS.value) for name in names
    ]  # all models with one seed, then the next
    results = {}
    for name, seed in jobs:
        workdir = output / "runs" / f"{name}-{seed}"
        if not (workdir / "result.json").exists():
            print(f"\n--- {name}, seed {seed}", flush=True)
            _train(table[name].config, seed, workdir)
        results.setdefault(name, []).append(_measure(workdir))
        _write(table, results, output)
    print((output / "table.md").read_text())
    print(f"wrote table.md, table.json and table.png in {output}")


def _train(config: str, seed: int, workdir: Path) -> None:
    """Trains in a new process, so that its memory is free afterwards."""
    name, *variant = config.split(":")
    variant = "-".join(variant + ["smoke"] * _SMOKE.value)
    command = [
        *("-m", "experiments.train", f"--config=configs/{name}.py{variant and ':' + variant}"),
        *(f"--workdir={workdir}", f"--config.seed={seed}"),
    ]
    if subprocess.run([sys.executable, *command]).returncode:
        raise ValueError(f"the training failed (see its error above): python {shlex.join(command)}")


def _measure(workdir: Path) -> dict:
    """Returns the test metrics of a trained run for each example, and its facts (sizes, seconds, split)."""
    from rec_jax.eval.evaluator import per_example
    from rec_jax.experiment import Experiment

    run = Experiment.open(workdir)
    config = run.config
    ranker = run.trained.ranker(run.mesh)
    values = per_example(ranker, run.histories, run.split, "test", config.eval, config.seed)
    result = json.loads((workdir / "result.json").read_text())
    return {
        "values": {name: values[name] for name in (*_KEYS, "users")},
        "test": result["test"],
        "baselines": result["baselines"],
        "params": result["params"],
        "train_secs": result["train_secs"],
        "command": result["command"],
        "max_len": config.data.max_len,
        "split": f"{run.split.kind}, checksum {run.split.checksum[:12]}",
        "filter_seen": config.eval.filter_seen,
        "num_items": run.histories.num_items,
    }


def summarise(rows: dict[str, Row], results: dict[str, list[dict]]) -> dict[str, dict]:
    """Returns {name: figures}, best NDCG@10 first. A paired test compares each model with the next one.

    results: for each model, what `_measure` returns for each seed.
    """
    from rec_jax.eval.metrics import bootstrap_interval, paired_test

    _check_same_protocol(results)
    users = next(iter(results.values()))[0]["values"]["users"]
    figures, means = {}, {}
    for name, runs in results.items():
        row, figure = rows[name], {"seeds": len(runs)}
        for key, published in (("hr@10", row.hr), ("ndcg@10", row.ndcg)):
            of_seeds = [float(run["values"][key].mean()) for run in runs]
            mean_E = np.mean([run["values"][key] for run in runs], axis=0)
            figure |= {
                key: float(np.mean(of_seeds)),
                f"{key}_std": float(np.std(of_seeds, ddof=1)) if len(runs) > 1 else None,
                f"{key}_of_seeds": of_seeds,
                f"{key}_ci": bootstrap_interval(mean_E, 1000, seed=0, users=users),
                f"{key}_published": published,
            }
        means[name] = mean_E
        figure["unfiltered"] = {
            key: float(np.mean([run["test"][f"unfiltered/{key}"] for run in runs])) for key in _KEYS
        }
        first = runs[0]
        figure |= {key: first[key] for key in ("params", "command", "max_len", "split", "num_items")}
        figure["filter_seen"] = first["filter_seen"]
        figure["train_secs"] = float(np.mean([run["train_secs"] for run in runs]))
        figures[name] = figure | {"source": row.source}
    ordered = sorted(figures, key=lambda name: -figures[name]["ndcg@10"])
    for name, below in zip(ordered, ordered[1:], strict=False):
        figures[name]["next_best"] = below
        figures[name]["p_over_next_best"] = paired_test(means[name], means[below], 2000, 0, users)
    return {name: figures[name] for name in ordered}


def _check_same_protocol(results: dict[str, list[dict]]) -> None:
    """Raises ValueError unless all runs have the same split, catalogue and policy on seen items."""
    (first, reference), *others = [(name, run) for name, runs in results.items() for run in runs]
    for name, run in others:
        for key in ("split", "num_items", "filter_seen"):
            if run[key] != reference[key]:
                raise ValueError(
                    f"{key}={run[key]!r} of {name}, but {reference[key]!r} of {first}: remove the run that "
                    "does not belong to this table from --output, or use another --output"
                )


def _write(rows: dict[str, Row], results: dict[str, list[dict]], output: Path) -> None:
    from rec_jax.experiment import write_json

    figures = summarise(rows, results)
    baselines = next(iter(results.values()))[0]["baselines"]
    write_json(output / "table.json", {"models": figures, "baselines": baselines})
    text = format_markdown(figures, baselines)
    if _SMOKE.value:
        text = f"Smoke runs: small models on simulated data, not comparable with published numbers.\n\n{text}"
    (output / "table.md").write_text(text)
    _plot(figures, baselines, output / "table.png")


_HEAD = (
    "model", "published HR@10 / NDCG@10", "HR@10", "NDCG@10", "95 % interval", "p over the next",
    "unfiltered HR@10 / NDCG@10", "seeds", "parameters", "training",
)  # fmt: skip


def format_markdown(figures: dict[str, dict], baselines: dict[str, dict]) -> str:
    lines = [_HEAD, ("---",) * len(_HEAD)]
    for name, row in figures.items():
        deviation = {key: f" ± {row[f'{key}_std']:.4f}" if row["seeds"] > 1 else "" for key in _KEYS}
        published = [row[f"{key}_published"] for key in _KEYS]
        unfiltered = row["unfiltered"]
        lines.append(
            (
                name,
                " / ".join("-" if x is None else f"{x:.4f}" for x in published),
                f"{row['hr@10']:.4f}{deviation['hr@10']}",
                f"{row['ndcg@10']:.4f}{deviation['ndcg@10']}",
                "{:.4f} to {:.4f}".format(*row["ndcg@10_ci"]),
                f"{row['p_over_next_best']:.3f}" if "p_over_next_best" in row else "",
                f"{unfiltered['hr@10']:.4f} / {unfiltered['ndcg@10']:.4f}",
                str(row["seeds"]),
                f"{row['params']:,}",
                f"{row['train_secs']:,.0f} s",
            )
        )
    for name, row in baselines.items():
        interval = "{:.4f} to {:.4f}".format(*row["ndcg@10_ci"]) if "ndcg@10_ci" in row else ""
        unfiltered = f"{row['unfiltered/hr@10']:.4f} / {row['unfiltered/ndcg@10']:.4f}"
        cells = (name, "", f"{row['hr@10']:.4f}", f"{row['ndcg@10']:.4f}", interval, "", unfiltered)
        lines.append(cells + ("",) * (len(_HEAD) - len(cells)))
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    any_row = next(iter(figures.values()))
    seen = "without" if any_row["filter_seen"] else "with"
    text += [
        "",
        f"Split: {any_row['split']}. Every target is ranked against the whole catalogue of "
        f"{any_row['num_items']:,} items, {seen} the items of the user's own history; tied scores: expected "
        "metric over random orderings. The model with the best validation NDCG@10 is tested once. ± is the "
        "standard deviation over seeds. The interval is a bootstrap over users, of the mean over seeds. p is "
        "the p-value of a paired randomization test over users, of the means over seeds; it does not account "
        "for the variation over seeds. Training is the time of all steps, without evaluations.",
        "",
    ]
    for name, row in figures.items():
        source = f" Published: {row['source']}." if row["source"] else ""
        text.append(f"- {name}: `{row['command']}` (histories of at most {row['max_len']} events).{source}")
    return "\n".join(text) + "\n"


def _plot(figures: dict[str, dict], baselines: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    from rec_jax.report import draw_scores

    figure = Figure(figsize=(8, 1 + 0.35 * len(figures | baselines)), layout="constrained")
    axes = figure.subplots()
    draw_scores(axes, figures, baselines)
    for y, row in enumerate(reversed(figures.values()), len(baselines)):
        axes.plot(row["ndcg@10_of_seeds"], [y] * row["seeds"], "|", color="black", markersize=9)
        if row["ndcg@10_published"] is not None:
            axes.plot(row["ndcg@10_published"], y, "x", color="tab:red")
    axes.set_xlabel("test NDCG@10: mean and interval (dot), seeds (bars), published (cross)")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    launch(main)
