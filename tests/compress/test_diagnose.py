"""Diagnostic tables against numbers computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from rec_jax.compress.diagnose import sensitivity, weight_table
from rec_jax.report import print_table

PARAMS = {
    "ff": {"bias": jnp.zeros(2), "kernel": jnp.array([[3.0, 0.0, -4.0], [0.0, 0.0, 12.0]])},
    "items": {"table": jnp.array([[1.0], [-2.0], [3.0], [-4.0]])},
}


def test_figures_of_weights_and_gradients(capsys):
    head, rows = weight_table(PARAMS)
    assert head == ("parameter", "shape", "zeros", "norm", "max |w|")
    assert rows[0] == ("ff/bias", "2", "100.0%", "0", "0")
    assert rows[1] == ("ff/kernel", "2x3", "50.0%", "13", "12")
    assert rows[2] == ("items/table", "4x1", "0.0%", "5.48", "4")
    grads = {
        "ff": {"bias": jnp.array([-1.0, 1.0]), "kernel": jnp.array([[0.0, 0.0, 3.0], [0.0, -4.0, 0.0]])},
        "items": {"table": jnp.arange(-300.0, 101.0)[:, None]},  # every |g| up to 100 occurs twice
    }
    head, rows = weight_table(PARAMS, grads)
    assert head[5:] == ("norm of g", "|g| 1%", "|g| 50%", "|g| 99%")
    assert rows[0][5:] == ("1.41", "1", "1", "1")
    assert rows[1][5:] == ("5", "0", "0", "3.95")
    assert rows[2][6:] == ("2", "100", "296")
    print_table(head, rows)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_one_parameter_at_a_time_is_pruned():
    evaluated = []

    def evaluate(params):
        evaluated.append(params)
        return float(
            jnp.sum(jnp.abs(params["ff"]["kernel"])) + 100 * jnp.sum(jnp.abs(params["items"]["table"]))
        )

    head, rows = sensitivity(PARAMS, "ff/kernel|items/.*", (0.5, 0.75), evaluate)
    assert head == ("parameter", "0%", "50%", "75%")
    assert rows == [
        (
            "ff/kernel",
            "1019.0000",
            "1019.0000",
            "1016.0000",
        ),  # 75% of 6 is 4.5, rounded to 4; 3 of the 6 are 0 already
        ("items/table", "1019.0000", "719.0000", "419.0000"),
    ]
    np.testing.assert_array_equal(evaluated[3]["items"]["table"], [[0], [0], [3], [-4]])
    for params in evaluated:
        assert params["ff"]["bias"] is PARAMS["ff"]["bias"]
    assert PARAMS["items"]["table"][0, 0] == 1


def test_a_pattern_without_match_lists_the_names():
    with pytest.raises(ValueError, match=r"names='blocks' matches no parameter.*items/table"):
        sensitivity(PARAMS, "blocks", (0.5,), lambda params: 0.0)
