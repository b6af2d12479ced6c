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
    """(loss, gradients of h and table) by the formula, in NumPy."""
    h, table, weights = (np.asarray(x, np.float64) for x in (h, table, weights))
    targets = np.asarray(targets)
    logits = h @ table.T
    logits[:, 0] = -np.inf
    largest = logits.max(1, keepdims=True)
    lse = largest[:, 0] + np.log(np.exp(logits - largest).sum(1))
    rows = np.arange(len(h))
    dlogits = np.exp(logits - lse[:, None])
    dlogits[rows, targets] -= 1
    dlogits *= weights[:, None]
    return (weights * (lse - logits[rows, targets])).sum(), dlogits @ table, dlogits.T @ h


def use_schedule(name, monkeypatch):
    monkeypatch.setattr(softmax, "STREAM_ITEMS", 10**9 if name == "token_tiles" else 0)


@pytest.fixture(params=["token_tiles", "item_tiles"])
def schedule(request, monkeypatch):
    use_schedule(request.param, monkeypatch)


def jitted():
    """Returns a new compiled function, because tests change the tile sizes."""
    return jax.jit(jax.value_and_grad(lambda *args: softmax.softmax_cross_entropy(*args), (0, 1)))


def check(args, rtol=2e-5, loss_and_grads=None):
    loss, grads = (loss_and_grads or jitted())(*args)
    expected_loss, *expected_grads = float64_reference(*args)
    np.testing.assert_allclose(loss, expected_loss, rtol=rtol)
    for grad, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


# With tiles of 8 tokens by 256 items: less than a tile, exactly one, one more token or item, several tiles.
@pytest.mark.parametrize(
    "schedule, num_tokens, num_rows",
    [("token_tiles", num_tokens, 256) for num_tokens in (1, 7, 8, 9, 24)]
    + [("item_tiles", 8, num_rows) for num_rows in (5, 255, 256, 257, 768)]
    + [("token_tiles", 25, 769), ("item_tiles", 25, 769)],
)
def test_equals_the_formula_around_tile_sizes(schedule, num_tokens, num_rows, monkeypatch):
    use_schedule(schedule, monkeypatch)
    monkeypatch.setattr(softmax, "TILE_ELEMENTS", 2048)
    check(inputs(num_tokens, num_rows))


def test_the_naive_loss_equals_the_formula():
    args = inputs(9, 257)
    np.testing.assert_allclose(
        softmax.naive_softmax_cross_entropy(*args), float64_reference(*args)[0], rtol=1e-5
    )


def test_huge_logits_stay_finite(schedule):
    check(inputs(8, 300, scale=3e3), rtol=1e-4)


def test_tokens_of_weight_zero_add_nothing(schedule):
    h, table, targets, _ = inputs(16, 300)
    weights = jnp.asarray(np.arange(16) % 2, jnp.float32)
    loss, (dh, dtable) = jitted()(h, table, targets, weights)
    expected, _, expected_dtable = float64_reference(h[1::2], table, targets[1::2], weights[1::2])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(dtable, expected_dtable, rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(dh[::2]) == 0) and np.all(np.asarray(dtable[0]) == 0)


def test_any_number_of_tokens_may_have_weight_zero(schedule, monkeypatch):
    """40 tokens in 5 tiles of 8; `num_weighted` of them, at random columns, have a weight."""
    monkeypatch.setattr(softmax, "TILE_ELEMENTS", 2048)
    h, table, targets, _ = inputs(40, 256)
    loss_and_grads = jitted()
    for num_weighted in (0, 1, 8, 9, 40):
        weights = np.zeros(40, np.float32)
        weights[np.random.default_rng(1).permutation(40)[:num_weighted]] = 2.0
        check((h, table, targets, jnp.asarray(weights)), loss_and_grads=loss_and_grads)


def test_bf16_inputs_get_bf16_gradients(schedule):
    h, table, targets, weights = inputs(32, 300)
    h, table = h.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
    loss, grads = jitted()(h, table, targets, weights)
    expected_loss, *expected_grads = float64_reference(h, table, targets, weights)
    assert loss.dtype == jnp.float32 and {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)  # all sums are in f32
    for grad, expected in zip(grads, expected_grads, strict=True):
        error = np.abs(np.asarray(grad, np.float32) - expected).max()
        assert error < 0.01 * np.abs(expected).max()


def temporary_bytes(fn, num_tokens, num_rows):
    shapes = (num_tokens, D), (num_rows, D), (num_tokens,), (num_tokens,)
    dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    args = [jax.ShapeDtypeStruct(*arg) for arg in zip(shapes, dtypes, strict=True)]
    compiled = jax.jit(jax.grad(fn, (0, 1))).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_temporary_memory_is_smaller_than_all_logits():
    naive = temporary_bytes(softmax.naive_softmax_cross_entropy, 8192, 16_384)
    assert naive > 4 * 8192 * 16_384
    for num_tokens, num_rows in [(4096, 8192), (8192, 16_384), (8192, 65_536)]:
        temp = temporary_bytes(softmax.softmax_cross_entropy, num_tokens, num_rows)
        # Several tiles, and gradients of the size of the inputs.
        inputs_bytes = 4 * D * (num_tokens + num_rows)
        assert temp < 6 * 4 * softmax.TILE_ELEMENTS + 6 * inputs_bytes
        assert temp < 4 * num_tokens * num_rows


@pytest.mark.parametrize("data, model", [(4, 2), (1, 1)])
def test_a_row_sharded_table_gives_the_same_loss_and_gradients(data, model, monkeypatch):
    monkeypatch.setattr(softmax, "TILE_ELEMENTS", 16 * 128)  # several tiles per device
    num_rows = 2500
    h, table, targets, weights = inputs(16, num_rows)
    targets = targets.at[3].set(num_rows - 1)
    placement, mesh = Placement(num_rows), make_mesh(MeshConfig(data=data, model=model))
    sharded = jax.device_put(placement.place(table), NamedSharding(mesh, P(AXES)))

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
    loss, dh, dtable = jax.jit(on_mesh)(h, sharded, targets, weights)
    expected, dh_expected, dtable_expected = float64_reference(h, table, targets, weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(dh, dh_expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(placement.unplace(dtable), dtable_expected, rtol=1e-4, atol=1e-5)
    is_real = np.asarray(placement.is_real(jnp.arange(placement.size)))
    assert not np.asarray(dtable)[~is_real].any()
