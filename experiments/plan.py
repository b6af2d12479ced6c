"""Plans the item embedding table on a mesh: memory per device and communication per step of each layout.

    python -m experiments.plan --config=configs/large_tables.py --config.mesh.data=4 --config.mesh.model=2
    python -m experiments.plan --config=configs/large_tables.py:1b --compile

The devices need not exist: the plan is for mesh.data times mesh.model of them. --compile also compiles the
training step for so many virtual CPU devices, without allocating its arrays, and prints the compiler's
figures: memory per device and bytes sent by each kind of collective. (Accelerators partition the same program
in the same way, but their temporary memory differs.) With table.layout=auto the plan chooses the layout.
"""

import dataclasses

import jax
from absl import flags

from experiments.launch import define_config, launch

_CONFIG = define_config("Config file, optionally with :variant.")
flags.declare_key_flag("config")
_NUM_ITEMS = flags.DEFINE_integer(
    "num_items",
    0,
    "Number of items. Needed unless the config simulates its data; 0 = number of simulated items.",
    lower_bound=0,
)
_COMPILE = flags.DEFINE_bool(
    "compile",
    False,
    "Also compile the training step and print the compiler's figures of memory and communication.",
)
flags.mark_flag_as_required("config")


def main():
    from rec_jax.config import build
    from rec_jax.run_config import ExperimentConfig

    config = build(ExperimentConfig, _CONFIG.value)
    data, model = config.mesh.data or 1, config.mesh.model
    if _COMPILE.value:
        jax.config.update("jax_num_cpu_devices", data * model)
    num_items = _NUM_ITEMS.value or (config.data.sim.num_items if config.data.format == "simulator" else 0)
    if not num_items:
        raise ValueError(
            "--num_items=N is needed: give the number of items, as a plan does not read the log of the config"
        )
    if config.train.batch_rows % data:
        raise ValueError(
            f"train.batch_rows={config.train.batch_rows} cannot be split over mesh.data={data}: make it a "
            "multiple of mesh.data (TrainConfig)"
        )
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=data))
    step = _plan(config, num_items)
    if _COMPILE.value:
        _compile(config, step)


def _plan(config, num_items: int):
    import numpy as np
    from jax.sharding import AbstractMesh

    from rec_jax.mesh import make_mesh
    from rec_jax.models.base import define_model
    from rec_jax.models.registry import model_builder
    from rec_jax.report import print_table
    from rec_jax.tables.plan import RULE
    from rec_jax.training import bytes_per_device, make_step, num_lookups, plan_layouts, with_layout

    data, model = config.mesh.data, config.mesh.model
    mesh = make_mesh(config.mesh) if _COMPILE.value else AbstractMesh((data, model), ("data", "model"))
    counts = np.broadcast_to(1, (num_items + 1,))  # unknown, and irrelevant for sizes
    definition = define_model(model_builder(config.model, num_items, config.data.max_len))
    step = make_step(config, definition, counts, mesh)
    layout = with_layout(config, num_items, mesh).table.layout
    print(
        f"mesh: data={data}, model={model}, {data * model} devices\n"
        f"item embedding table: {num_items + 1:,} entries x {config.model.table_dim} dims, "
        f"optimizer {config.table.optimizer}; each device looks up "
        f"{num_lookups(config, mesh):,} ids per step\n"
    )
    rows = [
        (
            cost.layout,
            _size(cost.table_bytes),
            _size(cost.state_bytes),
            _size(cost.sent_bytes),
            "yes" if cost.fits(config.table) else "no",
            "<-" if cost.layout == layout else "",
        )
        for cost in plan_layouts(config, num_items, mesh)
    ]
    fits = f"fits {config.table.device_gbytes:g} GB"
    print_table(("layout", "table/device", "optimizer/device", "sent/device/step", fits, ""), rows)
    print(
        f"\n{RULE}"
        if config.table.layout == "auto"
        else "\n<- is the layout that the config sets (table.layout)."
    )
    print(f"other parameters and their optimizer state: {_size(bytes_per_device(step))} per device")
    return step


def _compile(config, step):
    from experiments.speed.collectives import collective_bytes
    from rec_jax.data.batch import Batch
    from rec_jax.report import print_table

    mesh = step.mesh
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    shape = (config.train.batch_rows, config.data.max_len)
    ids = jax.ShapeDtypeStruct(shape, "int32", sharding=sharding)
    events = {name: ids for name in ("item", *step.model.columns)}
    batch = Batch(events, segments=ids, positions=ids, next={"item": ids})
    compiled = step.lower(step.abstract_state(), batch).compile()
    memory = compiled.memory_analysis()
    print(
        f"\ncompiled for {mesh.size} virtual CPU devices; memory per device:\n"
        f"  state and batch  {_size(memory.argument_size_in_bytes)}, "
        f"of which {_size(memory.alias_size_in_bytes)} are updated in place\n"
        f"  temporaries      {_size(memory.temp_size_in_bytes)}\n"
    )
    sent = collective_bytes(compiled.as_text(), mesh.size)
    print_table(("collective", "sent/device/step"), [(kind, _size(size)) for kind, size in sent.items()])
    print("(a loop, over micro-batches or rounds of an exchange, counts as one iteration)")


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.2f} {unit}"
    return f"{num_bytes} B"


if __name__ == "__main__":
    launch(main)
