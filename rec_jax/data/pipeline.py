"""Batches of packed rows, as a grain source whose elements are batches.

Element `step` depends only on (seed, step). So one number, which grain saves and restores, is the position of
a run in its data, and every host builds only its own rows.
"""

from dataclasses import dataclass

import grain.python as grain
import numpy as np

from rec_jax.data.histories import ranges
from rec_jax.data.packing import fill_rows, plan_packing, shuffled_users
from rec_jax.data.schema import Schema


@dataclass(frozen=True)
class EpochPlan:
    """Settings of the batches: batch_rows rows of max_len tokens per step, over all hosts."""

    max_len: int
    batch_rows: int
    epochs: int = 1
    seed: int = 0
    all_windows: bool = False  # train on whole histories in windows, not only on their last max_len targets


class BatchSource:
    """Random access to the training batches of all epochs.

    Each user with at least two training events appears once per epoch, with the last `max_len` targets. With
    all_windows, longer histories are cut into windows of `max_len` targets, from the end, and all windows
    appear. The rows of an epoch are divided evenly over its steps, so a batch may contain a few empty rows.

    is_causal=False is for models that predict masked items: the items end with the last training event
    instead of the one before it, and `next` is the event at the token itself. schema: features in batches.
    """

    def __init__(
        self,
        histories,
        split,
        plan: "EpochPlan",
        *,
        is_causal: bool = True,
        schema: Schema = (),
        host: int = 0,
        num_hosts: int = 1,
    ):
        max_len, batch_rows = plan.max_len, plan.batch_rows
        if batch_rows % num_hosts:
            raise ValueError(
                f"batch_rows={batch_rows} must be divisible by the number of hosts, {num_hosts} (TrainConfig)"
            )
        self._columns, self._schema, self._is_causal = histories.columns, schema, is_causal
        lengths = np.asarray(split.train_end) - histories.offsets[:-1] - is_causal
        if not is_causal:  # a single event cannot be predicted from others
            lengths = np.where(lengths < 2, 0, lengths)
        windows = -(-lengths // max_len) if plan.all_windows else np.minimum(lengths, 1)
        windows = np.maximum(windows, 0)
        self._window_user, index = np.repeat(np.arange(len(windows)), windows), ranges(0 * windows, windows)
        self._window_end = split.train_end[self._window_user] - is_causal - index * max_len
        self.plan = plan_packing(self._window_end - histories.offsets[self._window_user], max_len)
        self.steps_per_epoch = -(-self.plan.num_rows // batch_rows)
        self._batch_rows, self._epochs, self._seed = batch_rows, plan.epochs, plan.seed
        self._host, self._num_hosts = host, num_hosts
        self._cached_epoch = (-1, None, None)

    def __len__(self):
        return self._epochs * self.steps_per_epoch

    def __getitem__(self, step):
        slot_windows, rows = self._rows(int(step))
        per_host = self._batch_rows // self._num_hosts
        mine = rows[self._host * per_host : (self._host + 1) * per_host]
        batch = fill_rows(
            self._columns, self.plan, mine, slot_windows, self._window_end, per_host, self._schema
        )
        if self._is_causal:
            return batch
        return batch.replace(next={name: batch.events[name] for name in batch.next})

    def users(self, step: int) -> np.ndarray:
        """The users (their numbers in the histories) with events in the batch of a step."""
        slot_windows, rows = self._rows(step)
        starts = self.plan.row_starts
        windows = [slot_windows[starts[row] : starts[row + 1]] for row in rows]
        return self._window_user[np.concatenate(windows)]

    def _rows(self, step):
        epoch, index = divmod(step, self.steps_per_epoch)
        cached_epoch, slot_windows, order = self._cached_epoch  # read once: threads share the source
        if cached_epoch != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            slot_windows, order = shuffled_users(self.plan, rng), rng.permutation(self.plan.num_rows)
            self._cached_epoch = (epoch, slot_windows, order)
        bounds = [i * len(order) // self.steps_per_epoch for i in (index, index + 1)]
        return slot_windows, order[slice(*bounds)]


def make_iterator(source: BatchSource):
    """Returns a grain iterator over the batches in order, with `get_state` and `set_state`. A thread builds
    batches ahead."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
