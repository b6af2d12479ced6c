"""Memory per device and communication of each layout of an embedding table, and the choice of one."""

from dataclasses import dataclass

from rec_jax.tables.config import TableConfig

RULE = (
    "layout='auto' chooses, among the layouts that fit into table.device_gbytes, the one that sends the "
    "fewest bytes per step; if several are equal, the first one listed. A dense table that fits is "
    "replicated, like any parameter."
)


@dataclass(frozen=True)
class LayoutCost:
    """The cost of a layout for one device: bytes of the table, of its optimizer state, and sent per step."""

    layout: str
    table_bytes: int
    state_bytes: int
    sent_bytes: int

    def fits(self, config: TableConfig) -> bool:
        return self.table_bytes + self.state_bytes <= config.device_gbytes * 1e9


def ids_per_device(num_rows: int, length: int, num_negatives: int, num_views: int = 0) -> int:
    """Returns the number of ids that a device looks up per step: items, targets, negatives, items of views.

    num_rows: the packed rows of a device, each of `length` tokens. num_negatives: the total of these rows.
    """
    return 1 + (2 + num_views) * num_rows * length + num_negatives


def layout_costs(
    config: TableConfig, optimizer: str, num_rows: int, dim: int, num_ids: int, data: int, model: int
) -> list[LayoutCost]:
    """Returns the costs of all layouts that this table can have on a mesh of data x model devices.

    optimizer: the one of the dense parameters, used if the table is dense. num_ids: from `ids_per_device`.
    Assumes that arrays have a slot for every id, repeated ones included, and that every exchange takes one
    round. Bytes sent are those of ring algorithms: (n - 1) / n of an array to gather it over n devices, twice
    that to sum it.
    """
    kind = optimizer if config.optimizer == "dense" else config.optimizer
    state_numbers = {  # per entry
        "sgd": 0,
        "adagrad": dim,
        "rowwise_adagrad": 1,
        "lazy_adam": 2 * dim,
        "catch_up_adam": 2 * dim + 1,
    }
    entry_state_bytes = 4 * state_numbers.get(kind, 2 * dim)
    entry_bytes, num_devices = 4 * dim, data * model
    lookup_bytes = num_ids * (4 + entry_bytes)  # ids and their gradients
    over_data, over_model = (data - 1) / data, (model - 1) / model

    def cost(layout, parts, sent):
        rows = num_rows / parts
        return LayoutCost(layout, round(rows * entry_bytes), round(rows * entry_state_bytes), round(sent))

    if config.optimizer == "dense":
        costs = [cost("replicated", 1, 2 * over_data * num_rows * entry_bytes)]
    else:
        costs = [cost("replicated", 1, (data - 1) * lookup_bytes)]
    if num_devices == 1:
        return costs
    if config.optimizer != "dense" and model > 1 and dim % model == 0:
        gathered = over_model * num_ids * entry_bytes
        costs.append(cost("dims", model, gathered + (data - 1) * num_ids * (4 + entry_bytes / model)))
    exchanged = over_data * config.capacity_factor * lookup_bytes / model
    summed = 2 * over_model * num_ids * entry_bytes
    costs.append(cost("rows", num_devices, 2 * exchanged + summed))
    return costs


def choose_layout(config: TableConfig, costs: list[LayoutCost]) -> str:
    """Returns config.layout, or the layout chosen by RULE if it is "auto".

    Raises: ValueError if no layout fits.
    """
    if config.layout != "auto":
        return config.layout
    fitting = [cost for cost in costs if cost.fits(config)]
    if not fitting:
        least = min(costs, key=lambda cost: cost.table_bytes + cost.state_bytes)
        raise ValueError(
            f"device_gbytes={config.device_gbytes} is too small: the table and its optimizer state need at "
            f"least {(least.table_bytes + least.state_bytes) / 1e9:.1f} GB per device "
            f"(layout={least.layout!r}): use more devices or an optimizer with less state (TableConfig)"
        )
    if config.optimizer == "dense" and fitting[0].layout == "replicated":
        return "replicated"  # like any parameter
    return min(fitting, key=lambda cost: cost.sent_bytes).layout
