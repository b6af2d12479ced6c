"""A trained run made smaller: named recipes, and the way from a parent run to a stored model.

The order is that of `CompressConfig`: the architecture shrinks (or a student takes its place), training goes
on (distilling, masking, quantizing as asked), the result is stored.
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

# All parameters but biases, norms and routers, whose choices a rounding may change.
WEIGHTS = r"(?!.*router).*(kernel|embedding)"


def _taught(cfg, parent: Experiment) -> None:
    """Learns mostly from the parent, whose soft answers regularise; less dropout is needed beside them. A
    model without item vectors has no teacher."""
    if parent.model.is_generative:
        return
    cfg.compress.distill.teachers, cfg.compress.distill.weight = (str(parent.workdir),), 0.9
    cfg.model.dropout = parent.config.model.dropout / 4


def _fine_tune(cfg, parent: Experiment) -> None:
    """Half the parent's epochs, from its weights, with it as the teacher, whose answers regularise enough."""
    _taught(cfg, parent)
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
    cfg.compress.prune.end = 0.25  # what follows makes up for it
    # Gradients know which rows of the table people ask for; sizes of weights do not.
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
    _taught(cfg, parent)


RECIPES = {
    "bf16": _bf16,
    "int8": _int8,
    "int4_tables": _int4_tables,
    "prune70": _prune70,
    "prune70_int8": _prune70_int8,
    "shrink50": _shrink50,
    "distill25": _distill25,
    "alone25": _alone25,  # the student of distill25 without a teacher
}


def recipe_config(parent: Experiment, overrides: dict) -> ExperimentConfig:
    """The parent's config with what the recipe sets, and above it the overrides, {"train.epochs": 3}. Of the
    parent's own compression only what concerns the stored model stays: its training is done.

    Raises ValueError for an unknown recipe.
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
        raise ValueError("data.* must be that of the trained run, whose test part measures both (DataConfig)")
    unused = [name for name in overrides if name.startswith(("train.", "optim.", "precision."))]
    if unused and not will_train(parent, config):
        raise ValueError(
            f"{', '.join(unused)}: nothing will be trained, for neither masks nor teachers, adapters or "
            "quantization-aware training are requested (CompressConfig)"
        )
    return config


def student_width(parent: Experiment, share: float) -> int:
    """The largest width, even for each head, whose model has at most this share of the parameters."""
    model, most = parent.config.model, share * parent.num_params
    for width in range(model.width, 0, -2 * getattr(model, "num_heads", 1)):
        small = _narrowed(parent.config, width)
        builder = parent.builder(small)
        if num_params(define_model(builder).abstract_params) <= most:
            return width
    raise ValueError(f"no width gives {share:.0%} of the parameters of {parent.workdir}: set model.width")


_WIDTHS = ("width", "ff_width", "hidden_width")


def _narrowed(config: ExperimentConfig, width: int) -> ExperimentConfig:
    """The config with all its widths scaled."""
    before = {name: getattr(config.model, name, 0) for name in _WIDTHS}
    widths = {name: max(1, x * width // before["width"]) for name, x in before.items() if x}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **widths))


def half_the_work(parent: Experiment) -> ShrinkConfig:
    """Half the heads and fewer feed-forward channels, until at most half of the multiply-adds are left; of a
    single head, or where that is not enough, also fewer dims.

    Raises ValueError where a quarter of the dims is still too much, as for attention of long histories by one
    head, or where the model cannot shrink so.
    """
    model, units = parent.config.model, num_units(parent.model)
    max_len = parent.config.data.max_len
    heads, ff_width = max(1, units.get("heads", 0) // 2), units.get("ff_width", 0)
    fixed = {"heads": heads} if "heads" in units else {}
    most = answer_multiply_adds(parent.model, max_len) / 2

    def is_half(left: ShrinkConfig) -> bool:
        small = dataclasses.replace(parent.config, model=shrunk_config(model, left))
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
        f"recipe='shrink50': a quarter of width={model.width} is more than half the work of "
        f"{parent.workdir}; set compress.shrink.* yourself, or distil a student (ShrinkConfig)"
    )


def compress(parent: Experiment, config: ExperimentConfig, output) -> Experiment:
    """Makes the model that `config` describes from the parent's best one and stores it in `output`,
    which then is a run of its own. Goes on where it was stopped.

    Raises ValueError where the config asks for what cannot be.
    """
    model, asked = config.model, config.compress
    params = plain_params(parent)
    is_same = dataclasses.replace(model, dropout=parent.config.model.dropout) == parent.config.model
    if asked.shrink != ShrinkConfig():
        if not is_same:
            raise ValueError(
                "compress.shrink takes units from the trained model, and a changed model.* is another one: "
                "shrink first, then distil from the result (ShrinkConfig)"
            )
        grads = training_gradients(parent, params) if asked.shrink.score == "taylor" else None
        units = choose_units(parent.model, params, asked.shrink, grads, config.seed)
        model, params = shrink(parent.model, params, units)
    elif not is_same:
        params = _student(parent, config, params)
    config = dataclasses.replace(
        config,
        model=model,
        compress=dataclasses.replace(asked, shrink=ShrinkConfig()),  # it is done
    )
    _check_output(output, config)
    run = Experiment(config, output, base=params, dataset=parent.dataset, semantic_ids=parent.semantic_ids)
    _share_data(parent, run)
    step = parent.trained.step
    if params is None or _trains(asked):
        step, params = run.fit().best_step, plain_params(run)
    else:
        write_json(run.workdir / "config.json", dataclasses.asdict(run.config))
    if asked.quant.names:
        ranges = None
        if asked.quant.inputs == "static":
            ranges = observe_inputs(run.model, params, _first_batches(run))
        params = quantize_params(params, asked.quant, ranges, run.model.dims)
    if asked.floats == "bf16":
        params = cast_floats(params, jnp.bfloat16)
    run.save_model(params, step)
    return run


def _share_data(parent: Experiment, run: Experiment) -> None:
    """Gives the run the prepared split, by hard links where the file system has them."""
    if (parent.workdir / "data").exists() and not (run.workdir / "data").exists():
        partial = run.workdir / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(parent.workdir / "data", partial, copy_function=versions.link)
        partial.rename(run.workdir / "data")


def plain_params(run: Experiment):
    """Parameters of a run on the host. Raises ValueError if they are quantized."""
    trained = run.trained
    if trained.is_quantized:
        raise ValueError(f"--workdir={run.workdir} is quantized: use the run that it came from")
    return jax.tree.map(np.array, trained.params)


def _check_output(output, config: ExperimentConfig) -> None:
    """Raises ValueError where there is another run. What a run may change when it resumes does not count."""
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
    """Does `compress` train, or does it only change what is stored?"""
    return _trains(config.compress) or config.model != parent.config.model


def _trains(config: CompressConfig) -> bool:
    prune = config.prune.names or config.prune.hold
    return bool(config.distill.teachers or config.lora.names or prune or config.quant.aware)


def _first_batches(run: Experiment, num: int = 4) -> list[dict]:
    """Packed rows of training histories, to calibrate with."""
    source = run.batch_source()
    return [source[step] for step in range(min(num, len(source)))]


def training_gradients(parent: Experiment, params):
    """Of the parent's own loss, summed over a few training batches."""
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
    """Parameters that a model of another shape starts from: the teacher's table in its main directions; None
    where there is no teacher. Where only item_dim differs, all of the parent's but the table stay."""
    model = parent.config.model
    is_like = type(config.model) is type(model) and hasattr(model, "item_dim")
    if is_like and dataclasses.replace(config.model, item_dim=0, dropout=model.dropout) == model:
        return factorise_model(model, params, config.model.item_dim)[1]
    if not config.compress.distill.teachers:
        return None
    builder = parent.builder(config)
    fresh = jax.device_get(init_model(builder, config.seed)[1])
    return student_from(parent.config.model, params, config.model, fresh)
