"""Bytes of each layout by hand, and the choice among them."""

import dataclasses

import pytest

from rec_jax.objectives.token_loss import BCEConfig, SoftmaxConfig, num_negatives
from rec_jax.tables.config import TableConfig
from rec_jax.tables.plan import choose_layout, ids_per_device, layout_costs

CONFIG = TableConfig(optimizer="rowwise_adagrad", device_gbytes=1e-3)


def costs(config=CONFIG, num_rows=1000, dim=8, num_ids=64, data=2, model=4, optimizer="adam"):
    found = layout_costs(config, optimizer, num_rows, dim, num_ids, data, model)
    return {cost.layout: cost for cost in found}


@pytest.mark.parametrize(
    "loss, expected",
    [
        (SoftmaxConfig(), 1 + 2 * 4 * 10),
        (BCEConfig(num_negatives=3, sharing="row"), 1 + 2 * 4 * 10 + 4 * 3),
        (BCEConfig(num_negatives=3, sharing="position"), 1 + 2 * 4 * 10 + 4 * 10 * 3),
        (BCEConfig(num_negatives=3, sharing="batch"), 1 + 2 * 4 * 10 + 3),
    ],
)
def test_ids_of_a_device(loss, expected):
    drawn = num_negatives(loss, 4, 10)
    assert ids_per_device(4, 10, drawn) == expected
    assert ids_per_device(4, 10, drawn, num_views=2) == expected + 80


def test_costs_by_hand():
    found = costs()
    row, touched = 4 * 8, 64 * (4 + 4 * 8)
    assert {name: cost.table_bytes for name, cost in found.items()} == {
        "replicated": 1000 * row,
        "dims": 1000 * row // 4,
        "rows": 1000 * row // 8,
    }
    assert found["replicated"].state_bytes == 4000 and found["rows"].state_bytes == 500
    assert found["replicated"].sent_bytes == touched  # to the one other device of "data"
    assert found["dims"].sent_bytes == 64 * row * 3 // 4 + 64 * (4 + row // 4)
    # Half of what a device of a column asks for is the other's, there and back; columns add up.
    assert found["rows"].sent_bytes == touched // 4 + 2 * 64 * row * 3 // 4


def test_costs_of_a_table_that_is_like_any_parameter():
    found = costs(dataclasses.replace(CONFIG, optimizer="dense"))
    assert found.keys() == {"replicated", "rows"}
    assert found["replicated"].sent_bytes == 1000 * 32  # an all-reduce over two devices
    assert found["replicated"].state_bytes == 2 * 1000 * 32
    assert (
        costs(data=1, model=1).keys() == {"replicated"}
        and costs(data=1, model=1)["replicated"].sent_bytes == 0
    )


def test_the_rule():
    found = list(costs(num_rows=10_000).values())
    by_layout = {cost.layout: cost for cost in found}
    fitting = {name for name, cost in by_layout.items() if cost.fits(CONFIG)}
    assert fitting == {"replicated", "dims", "rows"}
    assert choose_layout(CONFIG, found) == min(found, key=lambda cost: cost.sent_bytes).layout
    assert choose_layout(dataclasses.replace(CONFIG, layout="rows"), found) == "rows"
    tight = dataclasses.replace(CONFIG, device_gbytes=5e-5)
    assert choose_layout(tight, found) == "rows"
    with pytest.raises(ValueError, match="device_gbytes=1e-05.*layout='rows'"):
        choose_layout(dataclasses.replace(CONFIG, device_gbytes=1e-5), found)
    dense = dataclasses.replace(CONFIG, optimizer="dense")
    assert choose_layout(dense, list(costs(dense).values())) == "replicated"
