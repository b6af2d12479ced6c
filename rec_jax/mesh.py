"""The only place that makes meshes, names axes and places arrays on devices."""

import os
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class MeshConfig:
    data: int = 0  # devices that share a batch; 0 = all there are

    def __post_init__(self):
        if self.data < 0:
            raise ValueError(f"data={self.data} must be positive, or 0 for all devices (MeshConfig)")


def use_cpu_cores() -> None:
    """Makes each CPU core a virtual device, so that a data-parallel mesh uses them all.

    Must run before JAX is first used. JAX_NUM_CPU_DEVICES, where set, wins.
    """
    if jax.config.jax_num_cpu_devices < 1:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh with the axis "data" over the first devices."""
    devices = jax.devices()
    num = config.data or len(devices)
    if num > len(devices):
        raise ValueError(
            f"mesh.data={num} but there are {len(devices)} devices ({devices[0].platform}); lower it, or "
            "set JAX_NUM_CPU_DEVICES to have more virtual ones on a CPU"
        )
    return Mesh(np.array(devices[:num]), ("data",))


def replicate(tree, mesh: Mesh):
    """Places every leaf whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Splits the rows of this host's part of a batch over its devices.

    Raises ValueError if they cannot be split evenly.
    """
    num_rows, num_devices = len(batch["items"]), len(mesh.local_devices)
    if num_rows % num_devices:
        raise ValueError(
            f"a batch of {num_rows} rows cannot be split over {num_devices} devices: make batch_rows a "
            "multiple of mesh.data"
        )
    sharding = NamedSharding(mesh, P("data"))
    if jax.process_count() == 1:  # the same, in half the time
        return jax.device_put(batch, sharding)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
