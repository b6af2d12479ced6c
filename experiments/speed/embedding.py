"""One update of an embedding table from the gradients of many lookups: dense optax against sparse updates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from experiments.speed.timing import interleaved
from rec_jax.tables.sparse import (
    catch_up_adam,
    find_distinct,
    scale_by_rowwise_rss,
    update_entries,
)

NUM_ROWS, DIMS = (100_000, 1_000_000, 4_000_000, 10_000_000), (64, 128)
NUM_LOOKUPS = 25_600
MAX_BYTES = 12 * 2**30  # tables, states and temporaries; larger cases are not run
_COPY_BYTES = 2**28
_RATE = 0.01

_ROWWISE = optax.chain(scale_by_rowwise_rss(), optax.scale(-_RATE))

# name -> (optimizer, number of arrays of the table's size that it changes, whether it updates every entry)
METHODS = {
    "dense_adam": (optax.adam(_RATE), 3, True),
    "dense_adagrad": (optax.adagrad(_RATE), 2, True),
    "sgd": (optax.sgd(_RATE), 1, False),
    "adagrad": (optax.adagrad(_RATE), 2, False),
    "rowwise_adagrad": (_ROWWISE, 1, False),
    "lazy_adam": (optax.adam(_RATE), 3, False),
    "catch_up_adam": (catch_up_adam(optax.constant_schedule(_RATE)), 3, False),
}


def measure_embedding(repeats: int, num_rows=NUM_ROWS, dims=DIMS) -> dict:
    """Returns {"rows_1000000_dim_64": {"rowwise_adagrad_ms": ..., ...}, ...}, on one device."""
    copy_gbytes = _copy_rate(repeats)
    cases = [(rows, dim) for dim in dims for rows in num_rows]
    bar = tqdm.tqdm(cases, desc="tables")
    result = {f"rows_{rows}_dim_{dim}": _measure(rows, dim, repeats, copy_gbytes) for rows, dim in bar}
    return result | {"copy_gbytes_per_sec": copy_gbytes, "lookups": NUM_LOOKUPS, "ids": "uniform"}


def _copy_rate(repeats: int) -> float:
    """Returns the GB read and written per second by a pass over a large array."""
    x = [jnp.ones(_COPY_BYTES // 4, jnp.float32)]
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no new memory pages

    def run():
        x[0] = copy(x[0]).block_until_ready()

    secs = interleaved({"copy": run}, repeats)["copy"]
    return float(2 * _COPY_BYTES / np.median(secs) / 1e9)


def _dense_step(optimizer, table_VD, state, ids_N, grads_ND):
    grads_VD = jnp.zeros_like(table_VD).at[ids_N].add(grads_ND)
    updates, state = optimizer.update(grads_VD, state, table_VD)
    return optax.apply_updates(table_VD, updates), state


def _sparse_step(optimizer, table_VD, state, ids_N, grads_ND):
    """Updates only the entries that were looked up; like the dense step, it excludes the lookup itself."""
    unique = find_distinct(ids_N, table_VD.shape[0])
    grads_UD = jnp.zeros_like(grads_ND).at[unique.local_ids_N].add(grads_ND)
    return update_entries(optimizer, table_VD, state, unique.entry_ids_U, grads_UD)


def _measure(num_rows: int, dim: int, repeats: int, copy_gbytes: float) -> dict:
    rng = np.random.default_rng(0)
    ids_N = jnp.asarray(rng.integers(0, num_rows, NUM_LOOKUPS), jnp.int32)
    grads_ND = jnp.asarray(rng.normal(size=(NUM_LOOKUPS, dim)), jnp.float32)
    num_unique = len(np.unique(ids_N))
    figures, runs = {"unique_ids": num_unique}, {}
    # A dense step also allocates the gradient of every entry.
    table_bytes = 4 * num_rows * dim
    methods = {name: m for name, m in METHODS.items() if (3 + m[2]) * table_bytes <= MAX_BYTES}
    if not methods:
        return figures | {"left_out": f"{3 * table_bytes / 2**30:.0f} GiB of table and moments"}
    arrays = _Arrays(num_rows, dim)
    for name, (optimizer, _, is_dense) in methods.items():
        step = partial(_dense_step if is_dense else _sparse_step, optimizer)
        step = jax.jit(step, donate_argnums=(0, 1))
        compiled = step.lower(*arrays.take(optimizer), ids_N, grads_ND).compile()
        figures[f"{name}_temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        runs[name] = partial(arrays.update, compiled, optimizer, ids_N, grads_ND)
    secs = interleaved(runs, repeats)
    for name, (_, num_arrays, is_dense) in methods.items():
        rows = num_rows if is_dense else num_unique
        # The gradients of the lookups are read; their sums and each array are read and written.
        gbytes = (4 * NUM_LOOKUPS * dim + 8 * rows * dim * (num_arrays + is_dense)) / 1e9
        figures[f"{name}_ms"] = float(1e3 * np.median(secs[name]))
        figures[f"{name}_percent_of_copy"] = float(np.median(100 * gbytes / secs[name] / copy_gbytes))
        for dense in ("dense_adam", "dense_adagrad"):
            if dense in secs and not is_dense:
                figures[f"{name}_over_{dense}"] = float(np.median(secs[dense] / secs[name]))
    return figures


class _Arrays:
    """A table and two state arrays of its size, shared by all methods so that large tables fit in memory."""

    def __init__(self, num_rows: int, dim: int):
        self._large = [jnp.zeros((num_rows, dim), jnp.float32) for _ in range(3)]
        self._rest = {}  # id of an optimizer -> (treedef of its state, which leaves are large, small leaves)

    def take(self, optimizer) -> tuple:
        """Returns (table, state); the large arrays of the state are the last of the shared arrays."""
        table = self._large[0]
        if id(optimizer) not in self._rest:
            leaves, treedef = jax.tree.flatten(jax.eval_shape(optimizer.init, table))
            is_large = [leaf.shape == table.shape for leaf in leaves]
            small = [jnp.zeros(x.shape, x.dtype) for x in leaves if x.shape != table.shape]
            self._rest[id(optimizer)] = (treedef, is_large, small)
        treedef, is_large, small = self._rest[id(optimizer)]
        large, small = iter(self._large[3 - sum(is_large) :]), iter(small)
        return table, treedef.unflatten([next(large if this else small) for this in is_large])

    def update(self, step, optimizer, ids, grads_ND) -> None:
        table, state = jax.block_until_ready(step(*self.take(optimizer), ids, grads_ND))
        treedef, is_large, _ = self._rest[id(optimizer)]
        leaves = list(zip(jax.tree.leaves(state), is_large, strict=True))
        large = [leaf for leaf, this in leaves if this]
        self._rest[id(optimizer)] = (treedef, is_large, [leaf for leaf, this in leaves if not this])
        self._large[0], self._large[3 - len(large) :] = table, large
