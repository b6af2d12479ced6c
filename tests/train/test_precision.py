"""Number formats: near f32, and kept as said."""

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
    "policy, rtol",
    [
        ({"compute": "bf16"}, 2e-2),
        ({"compute": "bf16", "output": "f32"}, 2e-2),
        ({"params": "bf16"}, 2e-2),
        ({"optimizer": "bf16"}, 2e-2),
    ],
)
def test_every_policy_learns_nearly_like_f32(policy, rtol):
    losses, params, _ = run(precision=PrecisionConfig(**policy), optim=ADAGRAD, steps=4)
    expected = reference(optim=ADAGRAD, steps=4)[0]
    np.testing.assert_allclose(losses, expected, rtol=rtol)
    assert losses != expected
    kept = jnp.bfloat16 if "params" in policy else np.float32
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(kept)}


def test_the_state_of_the_optimizer_is_kept_as_said_and_computed_in_f32():
    optimizer = kept_as(optax.adam(0.1), "bf16")
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = optimizer.init(params)
    assert state[0].mu["w"].dtype == state[0].nu["w"].dtype == jnp.bfloat16
    grads = {"w": jnp.array([0.1, 0.2, 0.3])}
    updates, state = optimizer.update(grads, state, params)
    expected, _ = optax.adam(0.1).update(grads, optax.adam(0.1).init(grads))
    np.testing.assert_array_equal(updates["w"], expected["w"])
    assert updates["w"].dtype == jnp.float32 and state[0].mu["w"].dtype == jnp.bfloat16


def test_sparse_updates_keep_f32():
    with pytest.raises(ValueError, match="table.optimizer=dense"):
        make_program("sampled", table="rowwise_adagrad", precision=PrecisionConfig(params="bf16"))
