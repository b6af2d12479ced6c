"""Plans the item embedding table on a mesh: memory per device and communication of each layout.

    python -m experiments.plan --config=configs/large_tables.py --config.mesh.data=4 --config.mesh.model=2
    python -m experiments.plan --config=configs/large_tables.py:1b --compile

The mesh need not exist: its size is mesh.data times mesh.model. With --compile the training step is compiled
for that many virtual CPU devices, nothing is allocated, and the compiler's own figures are printed: memory of
one device and bytes of each kind of collective. (On accelerators the same program is partitioned alike;
temporary memory differs.) The layout is chosen by rule, and table.layout overrides it.
"""

import dataclasses

import jax
from absl import flags

from experiments.launch import define_config, launch

_CONFIG = define_config("Config file, with an optional :variant.")
flags.declare_key_flag("config")
_NUM_ITEMS = flags.DEFINE_integer(
    "num_items", 0, "Items of the catalogue; by default those of a simulated world.", lower_bound=0
)
_COMPILE = flags.DEFINE_bool("compile", False, "Compile the step and print what the compiler says.")
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
            "--num_items=N is needed: a plan does not read the data, so it must be told the number of items"
        )
    if config.train.batch_rows % data:
        raise ValueError(
            f"batch_rows={config.train.batch_rows} cannot be split over mesh.data={data} (TrainConfig)"
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
    counts = np.broadcast_to(1, (num_items + 1,))  # nothing is known of them
    definition = define_model(model_builder(config.model, num_items, config.data.max_len))
    step = make_step(config, definition, counts, mesh)
    layout = with_layout(config, num_items, mesh).table.layout
    print(
        f"mesh: data={data}, model={model}, {data * model} devices\n"
        f"item embedding table: {num_items + 1:,} rows x {config.model.table_dim}, "
        f"optimizer {config.table.optimizer}; "
        f"{num_lookups(config, mesh):,} ids a device and step\n"
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
    print(f"\n{RULE}" if config.table.layout == "auto" else "\nThe layout is that of the config.")
    print(f"other parameters: {_size(bytes_per_device(step))} a device, their optimizer's state included")
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
        f"\ncompiled for {mesh.size} virtual CPU devices; of one device:\n"
        f"  state and batch  {_size(memory.argument_size_in_bytes)}, "
        f"{_size(memory.alias_size_in_bytes)} of it changed in place\n"
        f"  temporaries      {_size(memory.temp_size_in_bytes)}\n"
    )
    sent = collective_bytes(compiled.as_text(), mesh.size)
    print_table(("collective", "sent/device/step"), [(kind, _size(size)) for kind, size in sent.items()])
    print("(of a loop, as over micro-batches or rounds of an exchange, one turn is counted)")


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.2f} {unit}"
    return f"{num_bytes} B"


if __name__ == "__main__":
    launch(main)
