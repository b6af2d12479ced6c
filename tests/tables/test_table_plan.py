"""Costs of each layout by hand, and the choice of a layout."""

import dataclasses

import pytest

from rec_jax.objectives.token_loss import BCEConfig, SoftmaxConfig, num_negatives
from rec_jax.tables.config import TableConfig
from rec_jax.tables.plan import choose_layout, ids_per_device, layout_costs

CONFIG = TableConfig(optimizer="rowwise_adagrad", device_gbytes=1e-3)


def costs(config=CONFIG, num_rows=1000, dim=8, num_ids=64, data=2, model=4, optimizer="adam"):
    by_layout = layout_costs(config, optimizer, num_rows, dim, num_ids, data, model)
    return {cost.layout: cost for cost in by_layout}


@pytest.mark.parametrize(
    "loss, expected",
    [
        (SoftmaxConfig(), 1 + 2 * 4 * 10),
        (BCEConfig(num_negatives=3, sharing="row"), 1 + 2 * 4 * 10 + 4 * 3),
        (BCEConfig(num_negatives=3, sharing="position"), 1 + 2 * 4 * 10 + 4 * 10 * 3),
        (BCEConfig(num_negatives=3, sharing="batch"), 1 + 2 * 4 * 10 + 3),
    ],
)
def test_number_of_ids_per_device(loss, expected):
    drawn = num_negatives(loss, 4, 10)
    assert ids_per_device(4, 10, drawn) == expected
    assert ids_per_device(4, 10, drawn, num_views=2) == expected + 80


def test_costs_by_hand():
    by_layout = costs()
    entry, lookups = 4 * 8, 64 * (4 + 4 * 8)  # bytes
    assert {name: cost.table_bytes for name, cost in by_layout.items()} == {
        "replicated": 1000 * entry,
        "dims": 1000 * entry // 4,
        "rows": 1000 * entry // 8,
    }
    assert by_layout["replicated"].state_bytes == 4000 and by_layout["rows"].state_bytes == 500
    assert by_layout["replicated"].sent_bytes == lookups  # to the one other device of "data"
    assert by_layout["dims"].sent_bytes == 64 * entry * 3 // 4 + 64 * (4 + entry // 4)
    # In a column, half of a device's lookups go to the other device, in a read and in an update; a sum over
    # columns completes a read.
    assert by_layout["rows"].sent_bytes == lookups // 4 + 2 * 64 * entry * 3 // 4


def test_costs_of_a_dense_table():
    by_layout = costs(dataclasses.replace(CONFIG, optimizer="dense"))
    assert by_layout.keys() == {"replicated", "rows"}
    assert by_layout["replicated"].sent_bytes == 1000 * 32  # an all-reduce over two devices
    assert by_layout["replicated"].state_bytes == 2 * 1000 * 32


def test_one_device_has_one_layout_and_sends_nothing():
    by_layout = costs(data=1, model=1)
    assert by_layout.keys() == {"replicated"} and by_layout["replicated"].sent_bytes == 0


def test_auto_chooses_the_fitting_layout_that_sends_least():
    by_layout = costs(num_rows=10_000)
    choices = list(by_layout.values())
    assert {name for name, cost in by_layout.items() if cost.fits(CONFIG)} == {"replicated", "dims", "rows"}
    assert choose_layout(CONFIG, choices) == min(choices, key=lambda cost: cost.sent_bytes).layout
    assert choose_layout(dataclasses.replace(CONFIG, layout="rows"), choices) == "rows"
    tight = dataclasses.replace(CONFIG, device_gbytes=5e-5)
    assert choose_layout(tight, choices) == "rows"
    with pytest.raises(ValueError, match="device_gbytes=1e-05.*layout='rows'"):
        choose_layout(dataclasses.replace(CONFIG, device_gbytes=1e-5), choices)
    dense = dataclasses.replace(CONFIG, optimizer="dense")
    assert choose_layout(dense, list(costs(dense).values())) == "replicated"
