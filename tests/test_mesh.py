import jax
import numpy as np
import pytest

from rec_jax.mesh import MeshConfig, make_mesh, place_batch, replicate


def test_a_mesh_uses_all_devices_or_the_first_ones():
    assert make_mesh(MeshConfig()).shape == {"data": 8, "model": 1}
    assert make_mesh(MeshConfig(model=4)).shape == {"data": 2, "model": 4}
    assert list(make_mesh(MeshConfig(data=3)).devices.flat) == jax.devices()[:3]


def test_batches_are_split_and_trees_replicated():
    mesh = make_mesh(MeshConfig(data=4))
    rows = np.arange(16).reshape(8, 2)
    placed = place_batch({"items": rows}, mesh)["items"]
    np.testing.assert_array_equal(placed, rows)
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
    square = place_batch({"items": rows}, make_mesh(MeshConfig(data=2, model=2)))["items"]
    assert {shard.data.shape for shard in square.addressable_shards} == {(4, 2)}
    np.testing.assert_array_equal(square, rows)
    whole = replicate({"w": rows}, mesh)["w"]
    assert [shard.data.shape for shard in whole.addressable_shards] == [(8, 2)] * 4


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match=r"data=-1 .*MeshConfig"):
        MeshConfig(data=-1)
    with pytest.raises(
        ValueError, match="mesh.data=9 times mesh.model=1 but there are 8 devices.*JAX_NUM_CPU_DEVICES"
    ):
        make_mesh(MeshConfig(data=9))
    with pytest.raises(ValueError, match="6 rows.*4 devices.*batch_rows"):
        place_batch({"items": np.zeros((6, 2), np.int32)}, make_mesh(MeshConfig(data=4)))


def test_several_processes_must_use_all_devices_in_equal_numbers(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert make_mesh(MeshConfig(model=4)).shape == {"data": 2, "model": 4}
    for config in (MeshConfig(data=4), MeshConfig(model=8)):
        with pytest.raises(ValueError, match="one of 2 processes, with 4 of 8 devices.*mesh.data at 0"):
            make_mesh(config)
