"""Memory per device and communication of each layout of an embedding table, and the choice."""

from dataclasses import dataclass

from rec_jax.tables.config import TableConfig

RULE = (
    "Of the layouts that fit into table.device_gbytes, the one that sends the fewest bytes a step; of equals "
    "the first in this table. A dense table that fits is replicated, like any parameter."
)


@dataclass(frozen=True)
class LayoutCost:
    """Of one device: bytes of the table, bytes of its optimizer, bytes sent in a step."""

    layout: str
    table_bytes: int
    state_bytes: int
    sent_bytes: int

    def fits(self, config: TableConfig) -> bool:
        return self.table_bytes + self.state_bytes <= config.device_gbytes * 1e9


def ids_per_device(num_rows: int, length: int, num_negatives: int, num_views: int = 0) -> int:
    """Ids that one device looks up in a step: items, targets, negatives, and items of augmented views.

    num_rows: packed rows of the device, each of `length` tokens. num_negatives: of all its rows.
    """
    return 1 + (2 + num_views) * num_rows * length + num_negatives


def layout_costs(
    config: TableConfig, optimizer: str, num_rows: int, dim: int, num_ids: int, data: int, model: int
) -> list[LayoutCost]:
    """All layouts that this table can have on a mesh of data x model devices.

    optimizer: of the dense parameters, for a table that is one of them. num_ids: from `ids_per_device`.
    Arrays have places for all ids, distinct or not, and every exchange is taken to need one round. Bytes sent
    are those of ring algorithms: (n - 1) / n of an array gathered over n devices, twice that to sum it.
    """
    kind = optimizer if config.optimizer == "dense" else config.optimizer
    numbers = {
        "sgd": 0,
        "adagrad": dim,
        "rowwise_adagrad": 1,
        "lazy_adam": 2 * dim,
        "catch_up_adam": 2 * dim + 1,
    }
    state_row = 4 * numbers.get(kind, 2 * dim)
    row, num_devices = 4 * dim, data * model
    lookup_bytes = num_ids * (4 + row)  # ids and their gradients
    over_data, over_model = (data - 1) / data, (model - 1) / model

    def cost(layout, parts, sent):
        rows = num_rows / parts
        return LayoutCost(layout, round(rows * row), round(rows * state_row), round(sent))

    if config.optimizer == "dense":
        costs = [cost("replicated", 1, 2 * over_data * num_rows * row)]
    else:
        costs = [cost("replicated", 1, (data - 1) * lookup_bytes)]
    if num_devices == 1:
        return costs
    if config.optimizer != "dense" and model > 1 and dim % model == 0:
        gathered = over_model * num_ids * row
        costs.append(cost("dims", model, gathered + (data - 1) * num_ids * (4 + row / model)))
    exchanged = over_data * config.capacity_factor * lookup_bytes / model
    summed = 2 * over_model * num_ids * row
    costs.append(cost("rows", num_devices, 2 * exchanged + summed))
    return costs


def choose_layout(config: TableConfig, costs: list[LayoutCost]) -> str:
    """The layout of the config, or by the rule where it says "auto".

    Raises ValueError if no layout fits.
    """
    if config.layout != "auto":
        return config.layout
    fitting = [cost for cost in costs if cost.fits(config)]
    if not fitting:
        least = min(costs, key=lambda cost: cost.table_bytes + cost.state_bytes)
        raise ValueError(
            f"device_gbytes={config.device_gbytes}: the table and its optimizer take "
            f"{(least.table_bytes + least.state_bytes) / 1e9:.1f} GB of a device at the least "
            f"(layout={least.layout!r}); use more devices or a smaller optimizer (TableConfig)"
        )
    if config.optimizer == "dense" and fitting[0].layout == "replicated":
        return "replicated"  # a parameter like any other, as long as it fits
    return min(fitting, key=lambda cost: cost.sent_bytes).layout
