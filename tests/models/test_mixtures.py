"""Models with a mixture of experts keep the promises of every model."""

import pytest
import test_contracts as contracts

from rec_jax.models.sasrec import SASRecConfig


class MixtureSASRec(SASRecConfig):
    def __new__(cls, **fields):
        return SASRecConfig(num_experts=4, experts_per_token=2, capacity_factor=0.5, **fields)


@pytest.mark.parametrize(
    "contract",
    [
        contracts.test_a_history_is_encoded_the_same_in_any_company,
        contracts.test_nothing_that_comes_later_is_seen,
        contracts.test_asked_tokens_are_those_of_the_whole,
        contracts.test_dropout_follows_from_its_key,
    ],
    ids=lambda contract: contract.__name__,
)
def test_a_mixture_keeps_the_contracts(contract):
    contract(MixtureSASRec)
