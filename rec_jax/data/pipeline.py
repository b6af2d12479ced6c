"""Batches of packed rows, as a grain source whose element is a batch.

Element `step` depends on (seed, step) alone, so the data position of a run is one number, which grain
saves and restores, and every host builds only its own rows.
"""

import grain.python as grain
import numpy as np

from rec_jax.data.packing import fill_rows, plan_packing, shuffled_users


class BatchSource:
    """Random access to the training batches of all epochs.

    Every user with at least two training events appears once an epoch. The rows of an epoch are spread
    evenly over its steps, so a batch may hold a few empty rows.
    """

    def __init__(
        self,
        histories,
        split,
        *,
        max_len: int,
        batch_rows: int,
        epochs: int,
        seed: int,
        host: int = 0,
        num_hosts: int = 1,
    ):
        if batch_rows % num_hosts:
            raise ValueError(f"batch_rows={batch_rows} must be divisible by {num_hosts} hosts (TrainConfig)")
        self._items, self._train_end = histories.items, np.asarray(split.train_end)
        self.plan = plan_packing(self._train_end - histories.offsets[:-1] - 1, max_len)
        self.steps_per_epoch = -(-self.plan.num_rows // batch_rows)
        self._batch_rows, self._epochs, self._seed = batch_rows, epochs, seed
        self._host, self._num_hosts = host, num_hosts
        self._cached_epoch = (-1, None, None)

    def __len__(self):
        return self._epochs * self.steps_per_epoch

    def __getitem__(self, step):
        slot_users, rows = self._rows(int(step))
        per_host = self._batch_rows // self._num_hosts
        mine = rows[self._host * per_host : (self._host + 1) * per_host]
        return fill_rows(self._items, self.plan, mine, slot_users, self._train_end - 1, per_host)

    def users(self, step: int) -> np.ndarray:
        """The users (row numbers of the histories) whose events are in the batch of a step."""
        slot_users, rows = self._rows(step)
        starts = self.plan.row_starts
        return np.concatenate([slot_users[starts[row] : starts[row + 1]] for row in rows])

    def _rows(self, step):
        epoch, index = divmod(step, self.steps_per_epoch)
        cached_epoch, slot_users, order = self._cached_epoch  # read once: threads share the source
        if cached_epoch != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            slot_users, order = shuffled_users(self.plan, rng), rng.permutation(self.plan.num_rows)
            self._cached_epoch = (epoch, slot_users, order)
        bounds = [i * len(order) // self.steps_per_epoch for i in (index, index + 1)]
        return slot_users, order[slice(*bounds)]


def make_iterator(source: BatchSource):
    """A grain iterator over the batches in order, read ahead by a thread, with `get_state`/`set_state`."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
