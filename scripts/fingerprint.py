"""Prints losses and gradient norms of the first three steps for many settings, to check a refactoring.

    python scripts/fingerprint.py --output=before.json        # on the commit before the change
    python scripts/fingerprint.py --compare=before.json       # after it; exits with 1 if any case differs
    python scripts/fingerprint.py --only=hstu,lora --compare=before.json

The settings cover losses, sampling, table optimizers and layouts, meshes, augmentation, contrastive and other
objectives, clipping, compression, precision, and the smoke variant of every config. With the XLA flags of the
tests, which are set here, XLA fuses little, so refactored code that computes the same gives the same bits.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.12.")):  # as in tests/conftest.py
    flags = "--xla_backend_optimization_level=0 --xla_cpu_max_isa=AVX"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", flags)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

STEPS, TOTAL_STEPS = 3, 10

# Settings of every case, as flags of a config.
BASE = {
    "data.format": "simulator", "data.max_len": 12, "data.sim.num_items": 50, "data.sim.num_users": 120,
    "data.sim.num_interests": 4, "data.sim.mean_len": 10,
    "model.width": 16, "model.ff_width": 16, "model.num_heads": 2, "model.num_layers": 2,
    "model.dropout": 0.3, "semantic_ids.method": "kmeans", "semantic_ids.codebook_size": 8,
    "semantic_ids.min_used": 0.0, "semantic_ids.max_shared": 1.0,
    "optim.learning_rate": 1e-2, "train.batch_rows": 16, "train.micro_rows": 4,
    "mesh.data": 1, "table.layout": "replicated",
}  # fmt: skip
SAMPLED = {"loss.type": "sampled_softmax", "loss.num_negatives": 5}
TWO_BY_FOUR = {"mesh.data": 2, "mesh.model": 4}
MATRIX = {
    "softmax": {},
    "micro_all": {"train.micro_rows": 16},
    "sampled": SAMPLED,
    "sampled_popularity_position": SAMPLED | {"loss.sampler": "popularity", "loss.sharing": "position"},
    "sampled_batch": SAMPLED | {"loss.sharing": "batch"},
    "in_batch": SAMPLED | {"loss.sampler": "in_batch", "loss.sharing": "batch"},
    "bce_exclude": SAMPLED | {"loss.type": "bce", "loss.exclude_history": True, "loss.sharing": "position"},
    "gbce": SAMPLED | {"loss.type": "gbce"},
    "ips": {"loss.ips_power": 0.5},
    "ips_sampled": SAMPLED | {"loss.ips_power": 0.5},
    "popularity_discount": {"loss.popularity_discount": 0.5},
    "popularity_discount_sampled": SAMPLED | {"loss.popularity_discount": 0.5},
    "matryoshka": {"loss.matryoshka": (4, 8)},
    "matryoshka_normalised": {
        "loss.matryoshka": (4, 8), "model.l2_normalize": True, "model.temperature": 0.1
    },
    "num_future": {"model.num_future": 3},
    "matryoshka_num_future_sampled": SAMPLED | {"loss.matryoshka": (4,), "model.num_future": 2},
    "augment": {"augment.crop": 0.6, "augment.mask": 0.3, "augment.reorder": 0.5, "augment.substitute": 0.3},
    "contrastive_dropout": {"contrastive.weight": 0.2, "contrastive.same_target": True},
    "contrastive_augment": {"contrastive.weight": 0.2, "contrastive.view": "augment"},
    "clip": {"optim.clip_norm": 0.1},
    "adamw_cosine": {
        "optim.type": "adamw", "optim.weight_decay": 0.1, "optim.schedule": "cosine", "optim.warmup_steps": 2
    },
    "bf16": {"precision.compute": "bf16"},
    "bf16_output_f32": {"precision.compute": "bf16", "precision.output": "f32"},
    "bf16_kept": {"precision.params": "bf16", "precision.optimizer": "bf16"},
    "item_dim": {"model.item_dim": 8},
    "share_layers_pre": {"model.share_layers": True, "model.norm": "pre"},
    "original_norm_rotary": {"model.norm": "original", "model.position": "rotary"},
    "experts": {"model.num_experts": 4, "model.experts_per_token": 2},
    "data_8": {"mesh.data": 8},
    "mesh_2x4": TWO_BY_FOUR,
    "mesh_4x2_tensor": {"mesh.data": 4, "mesh.model": 2},
    "mesh_4x2_experts": {"mesh.data": 4, "mesh.model": 2, "model.num_experts": 4},
    "fully_sharded_clip": {"mesh.data": 4, "mesh.fully_sharded": True, "optim.clip_norm": 0.1},
    "reduce_bf16": {"mesh.data": 4, "mesh.reduce": "bf16"},
    "rows_dense_softmax": TWO_BY_FOUR | {"table.layout": "rows"},
    "rows_dense_softmax_all": TWO_BY_FOUR | {
        "table.layout": "rows", "optim.clip_norm": 0.1,
        "loss.popularity_discount": 0.5, "loss.ips_power": 0.5, "loss.matryoshka": (4,),
        "model.num_future": 2, "contrastive.weight": 0.2,
    },
    "rows_sparse_augment": TWO_BY_FOUR | SAMPLED | {
        "table.layout": "rows", "table.optimizer": "rowwise_adagrad", "optim.clip_norm": 0.1,
        "contrastive.weight": 0.2, "contrastive.view": "augment", "augment.crop": 0.6,
        "loss.popularity_discount": 0.5, "loss.ips_power": 0.5,
    },
    "rows_capacity": TWO_BY_FOUR | SAMPLED | {
        "table.layout": "rows", "table.optimizer": "adagrad", "table.capacity_factor": 0.3
    },
    "sparse_position": SAMPLED | {
        "table.optimizer": "lazy_adam", "loss.sharing": "position",
        "model.num_future": 2, "loss.matryoshka": (4,)
    },
    "sparse_in_batch": SAMPLED | {
        "table.optimizer": "adagrad", "loss.sampler": "in_batch", "loss.sharing": "batch", "mesh.data": 4
    },
    "sparse_bce_exclude": SAMPLED | {
        "table.optimizer": "adagrad", "loss.type": "bce", "loss.exclude_history": True
    },
    "distill": {"compress.distill.teachers": ("teacher",), "compress.distill.hidden_weight": 0.1},
    "distill_ranking": {"compress.distill.teachers": ("teacher",), "compress.distill.loss": "ranking"},
    "distill_sampled": SAMPLED | {"compress.distill.teachers": ("teacher",)},
    "lora": {"compress.lora.names": r".*(kernel|embedding)", "compress.lora.rank": 2},
    "prune": {"compress.prune.names": ".*kernel", "compress.prune.score": "taylor"},
    "prune_mesh": TWO_BY_FOUR | {"compress.prune.names": ".*kernel", "mesh.fully_sharded": True},
    "qat": {
        "compress.quant.names": ".*(kernel|embedding)", "compress.quant.aware": True,
        "compress.quant.inputs": "dynamic",
    },
}  # fmt: skip
for _optimizer in ("sgd", "adagrad", "rowwise_adagrad", "lazy_adam", "catch_up_adam"):
    _sparse = SAMPLED | {"table.optimizer": _optimizer}
    MATRIX |= {
        f"sparse_{_optimizer}": _sparse,
        f"rows_{_optimizer}": _sparse | TWO_BY_FOUR | {"table.layout": "rows"},
        f"dims_{_optimizer}": _sparse | TWO_BY_FOUR | {"table.layout": "dims"},
    }
for _type in ("esasrec", "bert4rec", "hstu", "gru4rec", "lru", "tiger"):
    MATRIX |= {
        f"{_type}": {"model.type": _type},
        f"{_type}_mesh": {"model.type": _type, "mesh.data": 4, "mesh.model": 2},
    }
    if _type not in ("tiger", "bert4rec"):
        MATRIX[f"{_type}_sparse_future"] = SAMPLED | {
            "model.type": _type, "table.optimizer": "adagrad", "model.num_future": 2
        }  # fmt: skip
MATRIX |= {
    "tiger_prefixes": {"model.type": "tiger", "model.prefix_embeddings": True},
    "hstu_no_time": {"model.type": "hstu", "model.time_bias": False},
    "gru4rec_hidden": {"model.type": "gru4rec", "model.hidden_width": 24},
    "esasrec_experts": {"model.type": "esasrec", "model.num_experts": 4},
    "bert4rec_sparse": SAMPLED | {"model.type": "bert4rec", "table.optimizer": "adagrad"},
}


def config_of(overrides: dict):
    """Builds the ExperimentConfig of BASE and overrides, without keys of BASE that the model lacks."""
    import dataclasses

    from rec_jax.config import build
    from rec_jax.models.registry import MODELS
    from rec_jax.run_config import ExperimentConfig

    classes = {cls.type: cls for cls in MODELS}
    fields = {field.name for field in dataclasses.fields(classes[overrides.get("model.type", "sasrec")])}
    tree = {}
    for name, value in (BASE | overrides).items():
        *sections, key = name.split(".")
        if sections == ["model"] and key not in fields and name not in overrides:
            continue
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return build(ExperimentConfig, tree)


def fingerprint(config, workdir) -> list:
    """Returns [[loss, gradient norm], ...] of the first steps."""
    from rec_jax.experiment import Experiment
    from rec_jax.mesh import place_batch
    from rec_jax.models.base import init_model

    compress = config.compress
    with contextlib.redirect_stdout(io.StringIO()):  # hides its report on the data
        experiment = Experiment(config, workdir)
    build = experiment.builder(config)
    base = init_model(build, seed=7)[1] if compress.lora.names else None
    teachers = [(experiment.model, init_model(build, seed=8)[1])] if compress.distill.teachers else []
    experiment._base = base
    step = experiment.step(TOTAL_STEPS, teachers)
    state, source, figures = step.init(experiment.first_params()), experiment.batch_source(), []
    for index in range(STEPS):
        state, metrics = step(state, place_batch(source[index], step.mesh))
        metrics = jax.device_get(metrics)
        figures.append([float(metrics["loss"][0] / metrics["loss"][1]), float(metrics["grad_norm"][0])])
    return figures


def smoke_configs():
    import importlib

    from rec_jax.config import build
    from rec_jax.run_config import ExperimentConfig

    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem in ("__init__", "common"):
            continue
        get_config = importlib.import_module(f"configs.{path.stem}").get_config
        yield f"page_{path.stem}", build(ExperimentConfig, get_config("smoke"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="JSON file to write the results to")
    parser.add_argument("--compare", help="JSON file of an earlier run to compare with")
    parser.add_argument(
        "--only", default="", help="run only cases whose names contain one of these, comma-separated"
    )
    parser.add_argument("--rtol", type=float, default=0.0, help="accepted relative difference")
    args = parser.parse_args()

    substrings = [part for part in args.only.split(",") if part]
    cases = {name: (lambda o=overrides: config_of(o)) for name, overrides in MATRIX.items()}
    cases |= {name: (lambda c=config: c) for name, config in smoke_configs()}
    before = json.loads(pathlib.Path(args.compare).read_text()) if args.compare else {}
    results, num_differing = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for name, make in cases.items():
            if substrings and not any(part in name for part in substrings):
                continue
            start = time.perf_counter()
            try:
                results[name] = fingerprint(make(), pathlib.Path(folder) / name)
            except Exception as error:  # the other cases are still run
                results[name] = f"{type(error).__name__}: {error}"
            verdict = ""
            if name in before:
                is_same = _agree(results[name], before[name], args.rtol)
                num_differing += not is_same
                verdict = "same" if is_same else f"DIFFERS from {before[name]}"
            print(f"{name:34s} {time.perf_counter() - start:5.1f} s  {results[name]}  {verdict}", flush=True)
    if args.output:
        pathlib.Path(args.output).write_text(json.dumps(results, indent=1))
    if args.compare:
        print(f"{num_differing} of {len(results)} differ")
    sys.exit(num_differing > 0)


def _agree(a, b, rtol: float) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    pairs = [(x, y) for row_a, row_b in zip(a, b, strict=True) for x, y in zip(row_a, row_b, strict=True)]
    return all(x == y or abs(x - y) <= rtol * max(abs(x), abs(y)) for x, y in pairs)


if __name__ == "__main__":
    main()
