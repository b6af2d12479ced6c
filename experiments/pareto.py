"""Compares compressed runs with their parent: quality kept, bytes, operations, latency."""

import itertools
import time

import jax
import numpy as np

from rec_jax.compress.prune import share_of_zeros
from rec_jax.compress.quant import dequantize_params, memory_bytes
from rec_jax.compress.work import answer_multiply_adds
from rec_jax.data.batch import Batch
from rec_jax.data.histories import examples
from rec_jax.eval.evaluator import per_example
from rec_jax.eval.metrics import bootstrap_ratio
from rec_jax.models.beam import generate
from rec_jax.models.scoring import top_items
from rec_jax.report import print_table
from rec_jax.tree import num_params

_CALLS = {1: 300, 64: 60}  # {batch size: number of timed calls of each model}
_TOP_K = 10
PARENT = "f32"


def measure(parent, runs: dict) -> dict[str, dict]:
    """Returns {name: figures} for the parent (named "f32") and each run, all on the parent's test part."""
    all_runs = {PARENT: parent, **runs}
    models = {name: run.trained for name, run in all_runs.items()}
    params = {name: jax.device_put(model.params, jax.devices()[0]) for name, model in models.items()}
    quality = {name: _per_example(parent, run) for name, run in all_runs.items()}
    users = quality[PARENT]["users"]
    times = _latencies(all_runs, params, parent)
    rows = {}
    for name, run in all_runs.items():
        work = answer_multiply_adds(run.model, run.config.data.max_len)
        row = {key: float(quality[name][key].mean()) for key in ("ndcg@10", "hr@10")}
        for key, kept in (("ndcg@10", "ndcg_kept"), ("hr@10", "hr_kept")):
            row[kept], row[f"{kept}_ci"] = bootstrap_ratio(
                quality[name][key], quality[PARENT][key], 1000, parent.config.seed, users=users
            )
        row |= {
            "params": num_params(run.model.abstract_params),
            "share_of_zeros": share_of_zeros(dequantize_params(params[name])),
            "bytes": models[name].param_bytes,
            "memory_bytes": memory_bytes(params[name]),
            "multiply_adds": work,
        }
        rows[name] = row | times[name]
    first = rows[PARENT]
    for row in rows.values():
        row["bytes_ratio"] = row["bytes"] / first["bytes"]
        row["memory_ratio"] = row["memory_bytes"] / first["memory_bytes"]
        row["flops_ratio"] = row["multiply_adds"] / first["multiply_adds"]
        row["params_ratio"] = row["params"] / first["params"]
    if {"distill25", "alone25"} <= set(rows):
        taught, alone = quality["distill25"]["ndcg@10"], quality["alone25"]["ndcg@10"]
        ratio, interval = bootstrap_ratio(taught, alone, 1000, parent.config.seed, users=users)
        rows["distill25"] |= {"ndcg_over_alone25": ratio, "ndcg_over_alone25_ci": interval}
    return rows


def _per_example(parent, run) -> dict[str, np.ndarray]:
    """NDCG@10, HR@10 and user of each example of the parent's test part."""
    config = parent.config
    ranker = run.trained.ranker(run.mesh)
    values = per_example(ranker, parent.histories, parent.split, "test", config.eval, config.seed)
    return {name: values[name] for name in ("ndcg@10", "hr@10", "users")}


def _latencies(runs: dict, params: dict, parent) -> dict[str, dict]:
    """Returns {name: {"p50_ms_batch1", "p99_ms_batch1", ..., "compiled_flops_batch1", ...}}.

    Calls of all models are interleaved, so that a change of the machine's load affects all of them.
    """
    rows = {name: {} for name in runs}
    for size, num_calls in _CALLS.items():
        batch = _batch(parent, size)
        calls, times = {}, {name: [] for name in runs}
        for name, run in runs.items():
            calls[name] = _lower_top_items(run, params[name], batch).compile()
            rows[name][f"compiled_flops_batch{size}"] = calls[name].cost_analysis()["flops"]
            jax.block_until_ready(calls[name](params[name], batch))
        for _ in range(num_calls):
            for name, call in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(call(params[name], batch))
                times[name].append(1e3 * (time.perf_counter() - start))
        for name, values in times.items():
            rows[name][f"p50_ms_batch{size}"] = float(np.percentile(values, 50))
            rows[name][f"p99_ms_batch{size}"] = float(np.percentile(values, 99))
    return rows


def _lower_top_items(run, params, batch):
    """The lowered program that returns the top items for a batch of histories."""
    if not run.model.is_generative:
        return top_items.lower(run.model, params, batch, _TOP_K)
    last_N = (batch.segments > 0).sum(1) - 1
    beams = run.config.model.num_beams
    return jax.jit(lambda params, batch: generate(run.model, params, batch, last_N, beams)).lower(
        params, batch
    )


def _batch(parent, size: int) -> Batch:
    """Histories of the test part, one per row."""
    ex = examples(parent.histories, parent.split, "test")
    max_len = parent.config.data.max_len
    items, segments, positions = np.zeros((3, size, max_len), np.int32)
    length = max_len if parent.model.is_causal else max_len - 1  # leaves room for a query token
    for row, index in enumerate(np.random.default_rng(0).integers(0, len(ex.users), size)):
        start, end = parent.histories.offsets[ex.users[index]], ex.ends[index]
        history = parent.histories.items[max(start, end - length) : end]
        inside = row, slice(len(history))
        items[inside], segments[inside], positions[inside] = history, 1, np.arange(len(history))
    features = {f.name: np.zeros(items.shape, f.dtype) for f in parent.dataset.schema}  # all missing
    return jax.device_put(Batch({"item": items} | features, segments, positions), jax.devices()[0])


HEAD = (
    "", "NDCG@10", "kept", "95 % interval", "HR@10", "kept", "disk", "smaller", "memory", "params", "zeros",
    "multiply-adds", "p50, 1", "p99, 1", "p50, 64", "p99, 64",
)  # fmt: skip


def _cells(name: str, row: dict) -> tuple:
    interval = "..".join(f"{x:.1%}" for x in row["ndcg_kept_ci"])
    return (
        name,
        f"{row['ndcg@10']:.4f}",
        f"{row['ndcg_kept']:.1%}",
        interval,
        f"{row['hr@10']:.4f}",
        f"{row['hr_kept']:.1%}",
        f"{row['bytes'] / 1e3:,.0f} kB",
        f"{1 / row['bytes_ratio']:.2f}x",
        f"{row['memory_bytes'] / 1e3:,.0f} kB",
        f"{row['params']:,}",
        f"{row['share_of_zeros']:.0%}",
        f"{row['flops_ratio']:.2f}",
        *(f"{row[f'p{p}_ms_batch{size}']:.2f} ms" for size in _CALLS for p in (50, 99)),
    )


def print_rows(rows: dict) -> None:
    print_table(HEAD, [_cells(name, row) for name, row in rows.items()])
    if "ndcg_over_alone25" in rows.get("distill25", {}):
        row = rows["distill25"]
        low, high = row["ndcg_over_alone25_ci"]
        print(f"distill25 over alone25: NDCG@10 x {row['ndcg_over_alone25']:.3f} ({low:.3f}..{high:.3f})")


def write(rows: dict, output) -> None:
    """Writes pareto.json, pareto.md and pareto.png."""
    from rec_jax.experiment import write_json

    write_json(output / "pareto.json", rows)
    lines = [HEAD, ("---",) * len(HEAD), *(_cells(name, row) for name, row in rows.items())]
    lines = ["| " + " | ".join(cells) + " |" for cells in lines]
    (output / "pareto.md").write_text("\n".join(lines) + "\n")
    _plot(rows, output / "pareto.png")


def _plot(rows: dict, path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = {
        "bytes_ratio": "bytes on disk, relative to the parent",
        "flops_ratio": "multiply-adds, relative to the parent",
        "p50_ms_batch64": "median ms for 64 users",
    }
    for axes, (key, label) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        for (name, row), marker in zip(rows.items(), itertools.cycle("ovs^D*Pp<>Xh"), strict=False):
            low, high = row["ndcg_kept_ci"]
            kept = row["ndcg_kept"]
            error = [[kept - low], [high - kept]]
            axes.errorbar(row[key], kept, error, fmt=marker, capsize=2, label=name, alpha=0.8)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.axhline(1, color="grey", linewidth=0.5)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right")
    figure.axes[0].set_ylabel("NDCG@10 kept (95 % interval)")
    figure.savefig(path, dpi=130)
