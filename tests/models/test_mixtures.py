"""Models with a mixture of experts have the properties of every model."""

import pytest
import test_contracts as contracts

from rec_jax.models.sasrec import SASRecConfig


class MixtureSASRec(SASRecConfig):
    def __new__(cls, **fields):
        return SASRecConfig(num_experts=4, experts_per_token=2, capacity_factor=0.5, **fields)


@pytest.mark.parametrize(
    "contract",
    [
        contracts.test_encoding_of_a_history_does_not_depend_on_its_row,
        contracts.test_later_events_are_not_used,
        contracts.test_query_positions_select_tokens,
        contracts.test_dropout_depends_only_on_its_key,
    ],
    ids=lambda contract: contract.__name__,
)
def test_a_mixture_fulfils_the_contracts(contract):
    contract(MixtureSASRec)
