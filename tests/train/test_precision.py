"""Number formats: near f32, kept as said, and never a step that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_runs import make_batch, make_program, reference, run

from rec_jax.mesh import place_batch
from rec_jax.train.optim import OptimConfig
from rec_jax.train.precision import LossScale, PrecisionConfig, kept_as

ADAGRAD = OptimConfig(type="adagrad", learning_rate=0.1)


@pytest.mark.parametrize(
    "policy, rtol",
    [
        ({"compute": "bf16"}, 2e-2),
        ({"compute": "bf16", "output": "f32"}, 2e-2),
        ({"compute": "f16"}, 2e-3),
        ({"compute": "f16", "output": "bf16"}, 2e-2),
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


def test_f16_is_the_same_on_every_mesh():
    policy = {"precision": PrecisionConfig(compute="f16", output="f32"), "optim": ADAGRAD}
    split = run(devices=2, model_axis=4, num_heads=4, fully_sharded=True, micro_rows=2, **policy)
    whole = run(num_heads=4, **policy)
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-4)
    np.testing.assert_allclose(split[2], whole[2], rtol=1e-2)  # of sums in another order, rounded to f16


def test_the_scale_halves_at_overflow_and_doubles_after_many_good_steps():
    scale = LossScale(jnp.float32(8), jnp.int32(498))
    scale = scale.after(True)
    assert (float(scale.scale), int(scale.good_steps)) == (8, 499)
    scale = scale.after(True)
    assert (float(scale.scale), int(scale.good_steps)) == (16, 0)
    scale = scale.after(True).after(False)
    assert (float(scale.scale), int(scale.good_steps)) == (8, 0)
    assert float(LossScale(jnp.float32(1), jnp.int32(0)).after(False).scale) == 1


def test_a_step_that_overflows_changes_only_the_scale():
    program = make_program(precision=PrecisionConfig(compute="f16", output="f32"))
    state = program.init_state()
    dense_state, loss_scale = state.opt_state
    huge = loss_scale._replace(scale=jnp.full_like(loss_scale.scale, 1e9))
    before = jax.device_get(state.params)
    state, metrics = program.make_step()(
        type(state)(state.step, state.params, (dense_state, huge)), place_batch(make_batch(), program.mesh)
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)
    assert float(state.opt_state[1].scale) == 5e8
    assert [float(x) for x in metrics["skipped"]] == [1, 1]
    assert [float(x) for x in metrics["grad_norm"]] == [0, 0]  # a mean over other steps is not touched
    assert np.isfinite(float(metrics["loss"][0])) and int(state.step) == 1


def test_a_table_of_touched_rows_takes_no_scaled_loss():
    with pytest.raises(ValueError, match="table.optimizer=dense"):
        make_program("sampled", table="rowwise_adagrad", precision=PrecisionConfig(compute="f16"))
