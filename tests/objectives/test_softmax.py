import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.objectives import softmax
from rec_jax.tables.exchange import AXES, Placement, shard_index

D = 8


def inputs(num_tokens, num_rows, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(num_tokens, D)) * scale, jnp.float32),
        jnp.asarray(rng.normal(size=(num_rows, D)), jnp.float32),
        jnp.asarray(rng.integers(1, num_rows, num_tokens), jnp.int32),
        jnp.asarray(rng.integers(0, 3, num_tokens), jnp.float32),
    )


def float64_reference(h, table, targets, weights):
    """Loss and gradients by the formula, in NumPy."""
    h, table, weights = (np.asarray(x, np.float64) for x in (h, table, weights))
    targets = np.asarray(targets)
    logits = h @ table.T
    logits[:, 0] = -np.inf
    top = logits.max(1, keepdims=True)
    lse = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    rows = np.arange(len(h))
    dlogits = np.exp(logits - lse[:, None])
    dlogits[rows, targets] -= 1
    dlogits *= weights[:, None]
    return (weights * (lse - logits[rows, targets])).sum(), dlogits @ table, dlogits.T @ h


@pytest.fixture(params=["token_tiles", "item_tiles"])
def schedule(request, monkeypatch):
    monkeypatch.setattr(softmax, "STREAM_ITEMS", 10**9 if request.param == "token_tiles" else 0)
    return request.param


def loss_and_grads(*args):
    """Compiled anew each time, for the tile sizes of the moment."""
    return jax.jit(jax.value_and_grad(lambda *args: softmax.softmax_cross_entropy(*args), (0, 1)))(*args)


def check(args, rtol=2e-5):
    loss, grads = loss_and_grads(*args)
    expected = float64_reference(*args)
    np.testing.assert_allclose(loss, expected[0], rtol=rtol)
    for grad, want in zip(grads, expected[1:], strict=True):
        np.testing.assert_allclose(grad, want, rtol=rtol, atol=rtol * np.abs(want).max())


# Tiles of 256 items by 8 tokens: one less, exactly, one more, and three of them.
@pytest.mark.parametrize(
    "num_tokens, num_rows",
    [(1, 256), (7, 256), (8, 256), (9, 256), (24, 256)] + [(8, 5), (8, 255), (8, 257), (8, 768), (25, 769)],
)
def test_equals_the_formula_around_tile_sizes(schedule, monkeypatch, num_tokens, num_rows):
    monkeypatch.setattr(softmax, "TILE_ELEMENTS", 2048)
    check(inputs(num_tokens, num_rows))


def test_naive_equals_the_formula():
    args = inputs(9, 257)
    np.testing.assert_allclose(
        softmax.naive_softmax_cross_entropy(*args), float64_reference(*args)[0], rtol=1e-5
    )


def test_huge_logits_stay_finite(schedule):
    check(inputs(8, 300, scale=3e3), rtol=1e-4)


def test_tokens_of_weight_zero_add_nothing(schedule):
    h, table, targets, _ = inputs(16, 300)
    weights = jnp.arange(16) % 2 * 1.0
    loss, (dh, dtable) = loss_and_grads(h, table, targets, weights)
    half, (_, dtable_half) = loss_and_grads(h[1::2], table, targets[1::2], weights[1::2])
    np.testing.assert_allclose(loss, half, rtol=1e-6)
    np.testing.assert_allclose(dtable, dtable_half, rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(dh[::2]) == 0) and np.all(np.asarray(dtable[0]) == 0)


@pytest.mark.parametrize("asked", [0, 1, 8, 9, 40])
def test_tiles_without_a_weight_are_skipped(schedule, monkeypatch, asked):
    """40 tokens in 5 tiles of 8, and only some, anywhere, have a weight."""
    monkeypatch.setattr(softmax, "TILE_ELEMENTS", 2048)
    h, table, targets, _ = inputs(40, 256)
    weights = np.zeros(40, np.float32)
    weights[np.random.default_rng(1).permutation(40)[:asked]] = 2.0
    check((h, table, targets, jnp.asarray(weights)))


def test_bf16_inputs_get_bf16_gradients(schedule):
    h, table, targets, weights = inputs(32, 300)
    h, table = h.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
    loss, grads = loss_and_grads(h, table, targets, weights)
    expected = float64_reference(h, table, targets, weights)
    assert loss.dtype == jnp.float32 and {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)  # sums are in f32, the target's too
    for grad, want in zip(grads, expected[1:], strict=True):
        error = np.abs(np.asarray(grad, np.float32) - want).max()
        assert error < 0.01 * np.abs(want).max()


def temporary_bytes(fn, num_tokens, num_rows):
    args = inputs(num_tokens, num_rows)
    compiled = jax.jit(jax.grad(fn, (0, 1))).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_temporary_memory_does_not_hold_tokens_times_items():
    """Doubling both at 4 times the product: naive memory grows 4 times, ours by what inputs grow."""
    naive = temporary_bytes(softmax.naive_softmax_cross_entropy, 8192, 16_384)
    assert naive > 4 * 8192 * 16_384
    for num_tokens, num_rows in [(4096, 8192), (8192, 16_384), (8192, 65_536)]:
        temp = temporary_bytes(softmax.softmax_cross_entropy, num_tokens, num_rows)
        # A handful of tiles, and gradients of the size of the inputs.
        inputs_bytes = 4 * D * (num_tokens + num_rows)
        assert temp < 6 * 4 * softmax.TILE_ELEMENTS + 6 * inputs_bytes
        assert temp < 4 * num_tokens * num_rows


@pytest.mark.parametrize("data, model", [(4, 2), (1, 1)])
def test_rows_spread_over_a_mesh_give_the_same_loss_and_gradients(data, model, monkeypatch):
    monkeypatch.setattr(softmax, "TILE_ELEMENTS", 16 * 128)  # several tiles a device
    num_rows = 2500
    h, table, targets, weights = inputs(16, num_rows)
    targets = targets.at[3].set(num_rows - 1)
    placement, mesh = Placement(num_rows), make_mesh(MeshConfig(data=data, model=model))
    spread = jax.device_put(placement.place(table), NamedSharding(mesh, P(AXES)))

    def part(h_TD, table_vD, targets_T, weights_T):
        real_v = placement.is_real(shard_index() * len(table_vD) + jnp.arange(len(table_vD)))
        loss, grads = jax.value_and_grad(softmax.sharded_softmax_cross_entropy, argnums=(0, 1))(
            h_TD, table_vD, real_v, placement.to_physical(targets_T), weights_T
        )
        return jax.lax.psum(loss, "data"), *grads

    specs = (P("data"), P(AXES), P("data"), P("data"))
    on_mesh = jax.shard_map(
        part, mesh=mesh, in_specs=specs, out_specs=(P(), P("data"), P(AXES)), check_vma=False
    )
    loss, dh, dtable = jax.jit(on_mesh)(h, spread, targets, weights)
    expected, dh_expected, dtable_expected = float64_reference(h, table, targets, weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(dh, dh_expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(placement.unplace(dtable), dtable_expected, rtol=1e-4, atol=1e-5)
    filled_up = np.asarray(placement.is_real(jnp.arange(placement.size)))
    assert not np.asarray(dtable)[~filled_up].any()
