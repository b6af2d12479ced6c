"""Number formats: results close to f32, and arrays stored in the configured dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_runs import make_program, reference, run

from rec_jax.train.optim import OptimConfig
from rec_jax.train.precision import PrecisionConfig, kept_as

ADAGRAD = OptimConfig(type="adagrad", learning_rate=0.1)


@pytest.mark.parametrize(
    "fields",
    [{"compute": "bf16"}, {"compute": "bf16", "output": "f32"}, {"params": "bf16"}, {"optimizer": "bf16"}],
)
def test_losses_are_close_to_f32(fields):
    losses, params, _ = run(precision=PrecisionConfig(**fields), optim=ADAGRAD, steps=4)
    expected = reference(optim=ADAGRAD, steps=4)[0]
    np.testing.assert_allclose(losses, expected, rtol=2e-2)
    assert losses != expected
    stored = jnp.bfloat16 if "params" in fields else np.float32
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(stored)}


def test_optimizer_state_is_stored_in_bf16_and_computed_in_f32():
    optimizer = kept_as(optax.adam(0.1), "bf16")
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = optimizer.init(params)
    assert state[0].mu["w"].dtype == state[0].nu["w"].dtype == jnp.bfloat16
    grads = {"w": jnp.array([0.1, 0.2, 0.3])}
    updates, state = optimizer.update(grads, state, params)
    expected, _ = optax.adam(0.1).update(grads, optax.adam(0.1).init(grads))
    np.testing.assert_array_equal(updates["w"], expected["w"])
    assert updates["w"].dtype == jnp.float32 and state[0].mu["w"].dtype == jnp.bfloat16


def test_sparse_updates_are_refused_with_bf16_parameters():
    with pytest.raises(ValueError, match="table.optimizer=dense"):
        make_program("sampled", table="rowwise_adagrad", precision=PrecisionConfig(params="bf16"))
