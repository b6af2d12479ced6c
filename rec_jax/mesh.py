"""Meshes: the only module that makes them, names their axes, and places batches and replicated arrays."""

import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, and what is split over them.

    "data" splits the batch. "model" splits attention by heads, the feed-forward by channels and a mixture of
    experts by experts, where the sizes are multiples of the axis; and tables as table.layout says.
    """

    data: int = 0  # devices that share a batch; 0 = the number of devices divided by `model`
    model: int = 1  # devices that share the heads, channels and tables; they get the same part of a batch
    fully_sharded: bool = False  # also shard parameters and optimizer over "data"; gathered in each step
    reduce: Literal["f32", "bf16"] = "f32"  # dtype of gradients (except those of tables) sent over "data"

    def __post_init__(self):
        if self.data < 0:
            raise ValueError(f"data={self.data} must be positive, or 0 for all devices (MeshConfig)")
        if self.model < 1:
            raise ValueError(f"model={self.model} must be at least 1 (MeshConfig)")


def use_cpu_cores() -> None:
    """Makes each CPU core a virtual device, so that a data-parallel mesh uses them all.

    Must run before JAX is first used. If JAX_NUM_CPU_DEVICES is set, it takes precedence.
    """
    if jax.config.jax_num_cpu_devices < 1:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def make_mesh(config: MeshConfig) -> Mesh:
    """Returns a mesh with the axes "data" and "model" over the first devices, or over all devices if there
    are several processes.

    The devices of a process are neighbours along "data", so that each process feeds its own rows of a batch.

    Raises ValueError if the devices do not suffice or cannot be divided among the processes.
    """
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    model = config.model
    data = config.data or max(1, len(devices) // model)
    if data * model > len(devices):
        raise ValueError(
            f"mesh.data={data} times mesh.model={model} but there are {len(devices)} devices "
            f"({devices[0].platform}): lower one of the two, or on a CPU set JAX_NUM_CPU_DEVICES to get more "
            "virtual devices"
        )
    num_processes, num_local = jax.process_count(), jax.local_device_count()
    if num_processes > 1 and (num_local % model or data * model != num_processes * num_local):
        raise ValueError(
            f"mesh.data={data} times mesh.model={model} but this is one of {num_processes} processes, with "
            f"{num_local} of {len(devices)} devices: give each process the same number of devices, a "
            "multiple of mesh.model, and leave mesh.data at 0 to use them all"
        )
    return Mesh(np.array(devices[: data * model]).reshape(data, model), ("data", "model"))


def replicate(tree, mesh: Mesh):
    """Replicates every leaf on every device. All processes must pass the same values."""
    sharding = NamedSharding(mesh, P())

    def place(leaf):
        if isinstance(leaf, np.ndarray) and jax.process_count() > 1:
            return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(place, tree)


def place_batch(batch, mesh: Mesh):
    """Splits this host's part of a batch over its devices along "data".

    batch: a pytree of arrays with the packed rows as first dim. Raises ValueError if the rows cannot be split
    evenly.
    """
    num_rows, num_parts = len(jax.tree.leaves(batch)[0]), mesh.local_mesh.shape["data"]
    if num_rows % num_parts:
        raise ValueError(
            f"a batch of {num_rows} rows cannot be split over {num_parts} devices: make train.batch_rows a "
            "multiple of mesh.data"
        )
    sharding = NamedSharding(mesh, P("data"))
    if jax.process_count() == 1:  # same result as below, in half the time
        return jax.device_put(batch, sharding)
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), batch)


def place_whole_batch(batch, mesh: Mesh):
    """Like `place_batch`, for a batch of which every host has all rows."""
    if jax.process_count() == 1:
        return place_batch(batch, mesh)
    sharding = NamedSharding(mesh, P("data"))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), batch)
