"""Compression of a trained run: named recipes, and the steps from a parent run to a stored smaller model.

The steps are those of `CompressConfig`, in its order: the architecture is shrunk (or replaced by a student),
the model is trained further (with distillation, masks or fake quantization as configured), the result is
stored.
"""

import bisect
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax import versions
from rec_jax.compress.config import CompressConfig
from rec_jax.compress.factor import factorise_model, student_from
from rec_jax.compress.quant import observe_inputs, quantize_params
from rec_jax.compress.shrink import ShrinkConfig, choose_units, num_units, shrink, shrunk_config
from rec_jax.compress.shrink import check as check_shrink
from rec_jax.compress.work import answer_multiply_adds
from rec_jax.config import build, override, to_config_dict
from rec_jax.experiment import Experiment, write_json
from rec_jax.models.base import define_model, init_model
from rec_jax.objectives.negatives import make_prior
from rec_jax.objectives.objective import Fixed, Objective, StepContext
from rec_jax.run_config import ExperimentConfig
from rec_jax.tree import cast_floats, num_params

# All parameters except biases, norms and routers: rounding a router may change which experts it chooses.
WEIGHTS = r"(?!.*router).*(kernel|embedding)"


def _distil_from_parent(cfg, parent: Experiment) -> None:
    """Sets the parent as the teacher, with weight 0.9, and reduces dropout: soft targets regularise. A
    generative retrieval model, which has no item vectors, gets no teacher."""
    if parent.model.is_generative:
        return
    cfg.compress.distill.teachers, cfg.compress.distill.weight = (str(parent.workdir),), 0.9
    cfg.model.dropout = parent.config.model.dropout / 4


def _fine_tune(cfg, parent: Experiment) -> None:
    """Sets fine-tuning for half the parent's epochs, from its weights and with it as the teacher. No dropout:
    the teacher's soft targets regularise enough."""
    _distil_from_parent(cfg, parent)
    cfg.model.dropout = 0.0
    cfg.train.epochs = max(1, round(parent.config.train.epochs / 2))
    cfg.train.eval_every_epochs, cfg.train.patience = 1.0, 0
    cfg.optim.warmup_steps = min(cfg.optim.warmup_steps, 20)


def _bf16(cfg, parent):
    cfg.compress.floats = "bf16"


def _int8(cfg, parent):
    cfg.compress.quant.names, cfg.compress.quant.inputs = WEIGHTS, "dynamic"


def _int4_tables(cfg, parent):
    cfg.compress.quant.names, cfg.compress.quant.table_bits = r".*embedding", 4


def _prune70(cfg, parent):
    _fine_tune(cfg, parent)
    cfg.compress.prune.names, cfg.compress.prune.share = WEIGHTS, 0.7
    cfg.compress.prune.end = 0.25  # the rest of training recovers quality
    # Gradients show which items are frequent; magnitudes of weights do not.
    cfg.compress.prune.score, cfg.compress.prune.scope = "taylor", "layer"


def _prune70_int8(cfg, parent):
    _prune70(cfg, parent)
    _int8(cfg, parent)
    cfg.compress.quant.aware = True


def _shrink50(cfg, parent):
    _fine_tune(cfg, parent)
    half = half_the_work(parent)
    for name, value in dataclasses.asdict(half).items():
        cfg.compress.shrink[name] = value
    cfg.compress.shrink.score = "taylor"


def _alone25(cfg, parent):
    student = _narrowed(parent.config, student_width(parent, 0.25)).model
    for name in _WIDTHS:
        if hasattr(student, name):
            cfg.model[name] = getattr(student, name)
    cfg.model.dropout /= 4  # a small model has less to regularise


def _distill25(cfg, parent):
    _alone25(cfg, parent)
    _distil_from_parent(cfg, parent)


RECIPES = {
    "bf16": _bf16,
    "int8": _int8,
    "int4_tables": _int4_tables,
    "prune70": _prune70,
    "prune70_int8": _prune70_int8,
    "shrink50": _shrink50,
    "distill25": _distill25,
    "alone25": _alone25,  # the model of distill25, trained without a teacher
}


def recipe_config(parent: Experiment, overrides: dict) -> ExperimentConfig:
    """The parent's config, changed first by the recipe and then by the overrides, {"train.epochs": 3}.

    If the parent was itself compressed, only its settings of the stored model (quant, floats) are kept, not
    those of its training.

    Raises ValueError for an unknown recipe, for overrides that change nothing, and for changed data.*.
    """
    before = parent.config.compress
    kept = CompressConfig(quant=dataclasses.replace(before.quant, aware=False), floats=before.floats)
    cfg = to_config_dict(dataclasses.replace(parent.config, compress=kept))
    recipe = overrides.get("compress.recipe", "")
    if recipe and recipe not in RECIPES:
        raise ValueError(f"compress.recipe={recipe!r} is unknown: use {', '.join(RECIPES)} (CompressConfig)")
    if recipe:
        RECIPES[recipe](cfg, parent)
    override(ExperimentConfig, cfg, overrides)
    config = build(ExperimentConfig, cfg)
    if not recipe and config.compress == CompressConfig() and config.model == parent.config.model:
        raise ValueError(
            "no compression requested: set --config.compress.recipe, other keys of compress, or a smaller "
            f"model.*; recipes are {', '.join(RECIPES)} (CompressConfig)"
        )
    if config.data != parent.config.data:
        raise ValueError(
            "data.* must be that of the trained run, because its test part measures both models: leave "
            "data.* as it is (DataConfig)"
        )
    unused = [name for name in overrides if name.startswith(("train.", "optim.", "precision."))]
    if unused and not will_train(parent, config):
        raise ValueError(
            f"{', '.join(unused)}: nothing will be trained, because neither masks, teachers, adapters nor "
            "quantization-aware training are set; leave these flags out (CompressConfig)"
        )
    return config


def student_width(parent: Experiment, share: float) -> int:
    """The largest width for which the model has at most this share of the parent's parameters. The width of a
    head stays even."""
    model, most = parent.config.model, share * parent.num_params
    for width in range(model.width, 0, -2 * getattr(model, "num_heads", 1)):
        small = _narrowed(parent.config, width)
        builder = parent.builder(small)
        if num_params(define_model(builder).abstract_params) <= most:
            return width
    raise ValueError(
        f"no width gives at most {share:.0%} of the parameters of {parent.workdir}: set model.width"
    )


_WIDTHS = ("width", "ff_width", "hidden_width")


def _narrowed(config: ExperimentConfig, width: int) -> ExperimentConfig:
    """The config with model.width = `width` and the other widths of the model scaled alike."""
    before = {name: getattr(config.model, name, 0) for name in _WIDTHS}
    widths = {name: max(1, x * width // before["width"]) for name, x in before.items() if x}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **widths))


def half_the_work(parent: Experiment) -> ShrinkConfig:
    """The units to keep so that at most half of the multiply-adds remain: half the heads and as many
    feed-forward channels as possible. Models with a single head, and models for which this does not suffice,
    also keep fewer dims, with feed-forward channels in proportion.

    Raises ValueError if even a quarter of the dims is too much work, as for one attention head on long
    histories, or if the model cannot be shrunk in this way.
    """
    model, units = parent.config.model, num_units(parent.model)
    max_len = parent.config.data.max_len
    heads, ff_width = max(1, units.get("heads", 0) // 2), units.get("ff_width", 0)
    fixed = {"heads": heads} if "heads" in units else {}
    most = answer_multiply_adds(parent.model, max_len) / 2

    def is_half(kept: ShrinkConfig) -> bool:
        small = dataclasses.replace(parent.config, model=shrunk_config(model, kept))
        return answer_multiply_adds(define_model(parent.builder(small)), max_len) <= most

    channels = [ShrinkConfig(**fixed, ff_width=x) for x in range(ff_width, ff_width // 4, -4)]
    channels = channels or [ShrinkConfig(**fixed)]
    dims = []
    for width in range(model.width, model.width // 4, -4):
        channel = {"ff_width": max(1, ff_width * width // model.width)} if ff_width else {}
        dims.append(ShrinkConfig(**fixed, width=width, **channel))
    for choices in ([channels] if units.get("heads", 0) > 1 else []) + [dims]:
        check_shrink(parent.model, choices[-1])
        if (index := bisect.bisect_left(choices, True, key=is_half)) < len(choices):
            return choices[index]
    raise ValueError(
        f"recipe='shrink50': a model of a quarter of width={model.width} still takes more than half the "
        f"multiply-adds of {parent.workdir}; set compress.shrink.*, or distil a student (ShrinkConfig)"
    )


def compress(parent: Experiment, config: ExperimentConfig, output) -> Experiment:
    """Makes the model that `config` describes from the parent's best model and stores it in `output`, as a
    run. Resumes an interrupted compression.

    Raises ValueError if the config requests an impossible compression, or if `output` holds another run.
    """
    model, requested = config.model, config.compress
    params = plain_params(parent)
    is_same = dataclasses.replace(model, dropout=parent.config.model.dropout) == parent.config.model
    if requested.shrink != ShrinkConfig():
        if not is_same:
            raise ValueError(
                "compress.shrink keeps units of the trained model, but model.* describes another model: "
                "shrink first, then distil from the result (ShrinkConfig)"
            )
        grads = training_gradients(parent, params) if requested.shrink.score == "taylor" else None
        units = choose_units(parent.model, params, requested.shrink, grads, config.seed)
        model, params = shrink(parent.model, params, units)
    elif not is_same:
        params = _student(parent, config, params)
    config = dataclasses.replace(
        config,
        model=model,
        compress=dataclasses.replace(requested, shrink=ShrinkConfig()),  # done above
    )
    _check_output(output, config)
    run = Experiment(config, output, base=params, dataset=parent.dataset, semantic_ids=parent.semantic_ids)
    _share_data(parent, run)
    step = parent.trained.step
    if params is None or _trains(requested):
        step, params = run.fit().best_step, plain_params(run)
    else:
        write_json(run.workdir / "config.json", dataclasses.asdict(run.config))
    if requested.quant.names:
        samples = None
        if requested.quant.inputs == "static":
            samples = observe_inputs(run.model, params, _first_batches(run))
        params = quantize_params(params, requested.quant, samples, run.model.dims)
    if requested.floats == "bf16":
        params = cast_floats(params, jnp.bfloat16)
    run.save_model(params, step)
    return run


def _share_data(parent: Experiment, run: Experiment) -> None:
    """Copies the parent's prepared split to the run, as hard links if the file system supports them."""
    if (parent.workdir / "data").exists() and not (run.workdir / "data").exists():
        partial = run.workdir / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(parent.workdir / "data", partial, copy_function=versions.link)
        partial.rename(run.workdir / "data")


def plain_params(run: Experiment):
    """The parameters of a run as NumPy arrays. Raises ValueError if they are quantized."""
    trained = run.trained
    if trained.is_quantized:
        raise ValueError(f"--workdir={run.workdir} is quantized: use the run that it was made from")
    return jax.tree.map(np.array, trained.params)


def _check_output(output, config: ExperimentConfig) -> None:
    """Raises ValueError if `output` holds a run with another config. Only data, model and compress are
    compared: a resumed run may change the rest."""
    path = pathlib.Path(output) / "config.json"
    if not path.exists():
        return
    before = build(ExperimentConfig, json.loads(path.read_text()))
    parts = ("data", "model", "compress")
    different = [name for name in parts if getattr(before, name) != getattr(config, name)]
    if different:
        raise ValueError(
            f"--output={output} holds a run with another {' and '.join(different)}: name another directory"
        )


def will_train(parent: Experiment, config: ExperimentConfig) -> bool:
    """Whether `compress` trains; if not, it only changes how the parent's parameters are stored."""
    return _trains(config.compress) or config.model != parent.config.model


def _trains(config: CompressConfig) -> bool:
    prune = config.prune.names or config.prune.hold
    return bool(config.distill.teachers or config.lora.names or prune or config.quant.aware)


def _first_batches(run: Experiment, num: int = 4) -> list[dict]:
    """The first batches of packed training histories, for calibration and gradients."""
    source = run.batch_source()
    return [source[step] for step in range(min(num, len(source)))]


def training_gradients(parent: Experiment, params):
    """Gradients of the parent's own loss, summed over a few training batches."""
    config = parent.config
    counts = parent.split.train_item_counts(parent.histories)
    fixed = Fixed(make_prior(config.loss, counts))
    objective = Objective(parent.model, config.loss, config.precision)

    @jax.jit
    def gradients(params, batch, seed):
        shared = objective.draw_shared(batch, seed, fixed)
        context = StepContext(jnp.zeros((), jnp.int32), seed, fixed, shared)
        return jax.grad(lambda p: objective(p, None, batch, None, context)[0])(params)

    total = jax.tree.map(jnp.zeros_like, params)
    for index, batch in enumerate(_first_batches(parent)):
        batch = batch.replace(row_ids=jnp.arange(len(batch.segments), dtype=jnp.int32))
        total = jax.tree.map(jnp.add, total, gradients(params, batch, jnp.uint32(index)))
    return jax.device_get(total)


def _student(parent: Experiment, config: ExperimentConfig, params):
    """Initial parameters of a model with another shape. If only item_dim differs: the parent's, with its item
    embedding table factorised. Else, with a teacher: see `student_from`; without: None."""
    model = parent.config.model
    has_item_dim = type(config.model) is type(model) and hasattr(model, "item_dim")
    if has_item_dim and dataclasses.replace(config.model, item_dim=0, dropout=model.dropout) == model:
        return factorise_model(model, params, config.model.item_dim)[1]
    if not config.compress.distill.teachers:
        return None
    builder = parent.builder(config)
    fresh = jax.device_get(init_model(builder, config.seed)[1])
    return student_from(parent.config.model, params, config.model, fresh)
