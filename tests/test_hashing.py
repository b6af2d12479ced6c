"""The numbers of the random sites."""

import pytest

from rec_jax.hashing import Site, dropout_site


def test_sites_do_not_collide_and_keep_their_numbers():
    """A run that is resumed with newer code must draw the same numbers."""
    assert [int(site) for site in Site] == [0, 1_000, 1_001, *range(2**29, 2**29 + 7), 2**30, 2**30 + 1]
    for count in (1, 2, 3):
        layers = range(999 // count)
        sites = [dropout_site(layer, number, count) for layer in layers for number in range(1, count + 1)]
        assert len({*sites, *Site}) == len(sites) + len(Site)
    assert [dropout_site(layer, 2, 2) for layer in range(3)] == [2, 4, 6]


@pytest.mark.parametrize("layer, number, count", [(500, 1, 2), (0, 0, 2), (0, 3, 2)])
def test_a_dropout_number_outside_its_range_is_refused(layer, number, count):
    with pytest.raises(AssertionError):
        dropout_site(layer, number, count)
