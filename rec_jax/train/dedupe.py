"""The distinct ids of a batch, found on the host while the device works on the batch before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rec_jax.train.losses import LossConfig, draw_shared
from rec_jax.train.step import lookups, step_seed_of
from rec_jax.train.tables import ItemTable


class DedupingSource:
    """A source of batches that also finds the distinct ids of each device, on the host, ahead of the step.

    Adds rows and places, int32[devices of "data", N + 1]. It draws the negatives that the step will draw;
    those that are drawn from the batch itself only where this host has all of it.
    """

    def __init__(self, source, loss_config: LossConfig, sampler, item_table: ItemTable, seed: int):
        mesh = item_table.layout.mesh
        self._source, self._item_table, self._parts = source, item_table, mesh.local_mesh.shape["data"]
        if loss_config.sampler == "in_batch" and jax.process_count() > 1:
            raise ValueError("host_dedupe=True with sampler='in_batch' is for one process (TableConfig)")

        @functools.partial(jax.jit, static_argnums=2)
        def find(step, batch, first_row):
            step_seed = step_seed_of(step, seed)
            row_ids = first_row + jnp.arange(batch["items"].shape[0], dtype=jnp.int32)
            shared = draw_shared(loss_config, sampler, step_seed, batch["targets"])
            return lookups(loss_config, sampler, step_seed, {**batch, "row_ids": row_ids}, shared)[0]

        self._find = find

    def __len__(self):
        return len(self._source)

    def __getitem__(self, step):
        batch = self._source[step]
        num_rows = len(batch["items"])
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            ids = jax.device_get(self._find(step, batch, jax.process_index() * num_rows))
        size, touched = num_rows // self._parts, []
        for first in range(0, num_rows, size):
            part = {k: v if k == "shared" else v[first : first + size] for k, v in ids.items()}
            touched.append(self._item_table.host_dedupe(part))
        rows, places = (np.stack(arrays) for arrays in zip(*touched, strict=True))
        return {**batch, "rows": rows, "places": places}
