"""Measures speed on this machine; prints a table and writes JSON.

    python -m experiments.benchmark --suite=train --output=train.json
    python -m experiments.benchmark --suite=train --output=beauty.json --only=beauty
    python -m experiments.benchmark --suite=softmax --output=softmax.json
    python -m experiments.benchmark --suite=embedding --output=embedding.json
    JAX_NUM_CPU_DEVICES=8 python -m experiments.benchmark --suite=sharding --output=sharding.json
    python -m experiments.benchmark --suite=models --output=models.json
    python -m experiments.benchmark --suite=lengths --output=lengths.json
    python -m experiments.benchmark --suite=beam --output=beam.json

Suite "train": real tokens per second of rec_jax's training step (packed rows, one virtual device per core)
against a naive JAX step on padded histories with the same maths: SASRec with 50 dims, 2 blocks and 1 head,
BCE with one negative, Adam, 128 users per batch. It uses the history lengths of MovieLens-1M (cut to 200) and
of Amazon Beauty (cut to 50), and also measures the loader alone. The lengths are the real ones if
$REC_JAX_DATA holds ml-1m/ml-1m.txt and beauty/Beauty.txt; otherwise they are drawn from a log-normal
distribution with the same mean. The JSON says which.
Suite "softmax": loss and gradients of 1,024 tokens of 64 dims, for catalogues of 4 thousand to a million
items: exact cross-entropy with all logits in memory, streamed exact cross-entropy, the same where only a
fifth of the tokens have a target, and sampled softmax (256 negatives per row). Methods that would need more
than 3 GiB of temporary memory are not run.
Suite "embedding": one update of a table with 100 thousand to 10 million entries from the gradients of 25,600
lookups: dense optax Adam and Adagrad, which update every entry, against sparse updates of the entries that
were looked up; finding the distinct ids is part of the step. The bytes that each must move are compared with
a copy of a large array. Methods that would need more than 12 GiB are not run.
Suite "sharding": 25,600 lookups with Zipf-distributed ids, in a table of a million entries over eight devices
(virtual ones on a CPU): bytes sent, counted in the compiled program, and time, for plain indexing, for sums
of each device's own entries, and for an exchange of distinct ids.
Suite "models": one training step of every sequence model, width 128 and 2 layers, on one device, relative to
SASRec; also at equal work, by multiply-adds counted in the program.
Suite "lengths": one step of the linear recurrence and of SASRec over 8,192 events, in histories of 512 to
8,192 events.
Suite "beam": the next items of one user with 50 events, from 10,000 items with semantic ids of 4 codes of
256, by beam searches with 10 and 50 beams, against reading the history alone: 3 layers of 128 dims, with
prefix embeddings.

The compared functions run alternately, A B A B, and ratios are taken pair by pair, so that other work on the
machine disturbs both sides alike. The printed figures are medians.
"""

import datetime
import json
import pathlib
import sys

from absl import flags

from experiments.launch import launch
from rec_jax.report import print_table

_SUITE = flags.DEFINE_enum(
    "suite",
    "train",
    ["train", "softmax", "embedding", "sharding", "models", "lengths", "beam"],
    "What to measure.",
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write the figures to.")
_ONLY = flags.DEFINE_enum("only", "both", ["ml1m", "beauty", "both"], "History lengths for --suite=train.")
_PAIRS = flags.DEFINE_integer("pairs", 9, "Number of times each function is timed.", lower_bound=1)
flags.mark_flag_as_required("output")


def main():
    from experiments.speed.timing import machine

    suites = {
        "train": _train,
        "softmax": _softmax,
        "embedding": _embedding,
        "sharding": _sharding,
        "models": _models,
        "lengths": _lengths,
        "beam": _beam,
    }
    context = {
        "machine": machine(),
        "command": " ".join(["python -m experiments.benchmark", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    result = suites[_SUITE.value]() | context
    path = pathlib.Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    print(f"wrote {path}")


def _train() -> dict:
    from experiments.speed.training import measure_loader, measure_training

    names = ["ml1m", "beauty"] if _ONLY.value == "both" else [_ONLY.value]
    result = {name: measure_training(name, _PAIRS.value) for name in names}
    result["loader"] = measure_loader(_PAIRS.value)
    head = ("lengths", "ours tokens/s", "naive tokens/s", "ratio", "lowest", "highest", "fill", "% of limit")
    rows = [
        (
            f"{name} ({r['lengths']})",
            f"{r['ours_tokens_per_sec']:,.0f}",
            f"{r['naive_tokens_per_sec']:,.0f}",
            f"{r['ratio']:.2f}",
            f"{r['ratio_min']:.2f}",
            f"{r['ratio_max']:.2f}",
            f"{r['fill']:.3f} / {r['naive_fill']:.3f}",
            f"{r['percent_of_limit']:.1f} / {r['naive_percent_of_limit']:.1f}",
        )
        for name, r in result.items()
        if name != "loader"
    ]
    print_table(head, rows)
    print(f"loader: {result['loader']['sequences_per_sec']:,.0f} sequences/s (Beauty lengths, one process)")
    return result


def _softmax() -> dict:
    from experiments.speed.softmax import measure_softmax

    result = measure_softmax(_PAIRS.value)
    head = ("catalogue", "method", "ms", "full / this", "temporary MiB", "useful GFLOP/s", "% of limit")
    rows = []
    for catalogue, methods in result.items():
        for name, r in methods.items():
            size = f"{r['temp_bytes'] / 2**20:,.0f}"
            if "ms" not in r:
                rows.append((catalogue, name, "too large", "", size, "", ""))
                continue
            ratio = f"{r['full_over_this']:.2f}" if "full_over_this" in r else ""
            rate, percent = f"{r['gflops_per_sec']:.1f}", f"{r['percent_of_limit']:.1f}"
            rows.append((catalogue, name, f"{r['ms']:.1f}", ratio, size, rate, percent))
    print_table(head, rows)
    return result


def _embedding() -> dict:
    from experiments.speed.embedding import METHODS, measure_embedding

    result = measure_embedding(_PAIRS.value)
    rows = []
    for table, r in result.items():
        for name in METHODS if isinstance(r, dict) else ():
            if f"{name}_ms" not in r:
                rows.append((table, name, "too large", "", "", ""))
                continue
            ratio = f"{r[key]:.1f}" if (key := f"{name}_over_dense_adam") in r else ""
            figures = (f"{r[f'{name}_ms']:.2f}", ratio, f"{r[f'{name}_percent_of_copy']:.0f}")
            rows.append((table, name, *figures, f"{r[f'{name}_temp_bytes'] / 2**20:,.0f}"))
    print_table(("table", "method", "ms", "dense Adam / this", "% of copy", "temporary MiB"), rows)
    print(f"copy: {result['copy_gbytes_per_sec']:.1f} GB/s read and written; {result['lookups']:,} lookups")
    return result


def _sharding() -> dict:
    from experiments.speed.sharding import measure_sharding

    result = measure_sharding(_PAIRS.value)
    rows = [
        (name, f"{r['bytes_sent'] / 1e6:.2f}", f"{r['gather_bytes_over_this']:.1f}", f"{r['ms']:.2f}")
        for name, r in result.items()
        if isinstance(r, dict)
    ]
    print_table(("lookup", "MB sent per device", "gather / this", "ms"), rows)
    return result


def _models() -> dict:
    from experiments.speed.models import measure_models

    result = measure_models(_PAIRS.value)
    rows = [
        (
            name,
            f"{r['ms']:.1f}",
            f"{r['multiply_adds'] / 1e9:.2f}",
            f"{r['time_over_sasrec']:.2f}",
            f"{r['work_over_sasrec']:.2f}",
            f"{r['time_over_sasrec_at_equal_work']:.2f}",
        )
        for name, r in result.items()
    ]
    head = ("model", "ms", "G multiply-adds", "time / SASRec", "work / SASRec", "time at equal work")
    print_table(head, rows)
    return result


def _lengths() -> dict:
    from experiments.speed.models import measure_lengths

    result = measure_lengths(_PAIRS.value)
    lengths = list(next(iter(result.values())))
    print_table(
        ("ms per step", *lengths), [(name, *(f"{r[n]:.0f}" for n in lengths)) for name, r in result.items()]
    )
    return result


def _beam() -> dict:
    from experiments.speed.beam import measure_beam

    result = measure_beam(_PAIRS.value)
    rows = [
        (name, *(f"{r[key]:.2f}" for key in ("ms", "ms_min", "ms_max")))
        for name, r in result.items()
        if isinstance(r, dict)
    ]
    print_table((f"{result['items']:,} items", "ms", "lowest", "highest"), rows)
    return result


if __name__ == "__main__":
    launch(main)
