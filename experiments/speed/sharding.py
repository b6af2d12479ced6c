"""A lookup in a table sharded over eight devices: communication and time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.speed.collectives import collective_bytes
from experiments.speed.timing import interleaved
from rec_jax.mesh import MeshConfig, make_mesh
from rec_jax.tables.exchange import AXES, Placement, dedupe_physical, read_sharded

NUM_DEVICES = 8
NUM_ROWS, DIM, NUM_LOOKUPS = 1_000_000, 64, 25_600


def measure_sharding(repeats: int) -> dict:
    """Returns {"gather": figures, "psum_scatter": ..., "ours": ...}; each looks up the same Zipf batch."""
    mesh = make_mesh(MeshConfig(data=NUM_DEVICES))
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, NUM_ROWS + 1)
    ids = rng.choice(NUM_ROWS, NUM_LOOKUPS, p=popularity / popularity.sum()).astype(np.int32)
    table = rng.normal(size=(NUM_ROWS, DIM)).astype(np.float32)
    placement = Placement(NUM_ROWS)
    ids_N = jax.device_put(ids, NamedSharding(mesh, P("data")))
    by_row, placed = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(AXES))
    methods = {
        "gather": (jax.jit(_gather, out_shardings=by_row), jax.device_put(table, by_row)),
        "psum_scatter": (jax.jit(_on(mesh, _psum_scatter, P("data"))), jax.device_put(table, by_row)),
        "ours": (
            jax.jit(_on(mesh, partial(_exchange, placement), P(AXES))),
            jax.device_put(placement.place(table), placed),
        ),
    }
    figures, runs = {}, {}
    for name, (lookup, array) in methods.items():
        compiled = lookup.lower(array, ids_N).compile()
        np.testing.assert_array_equal(compiled(array, ids_N), table[ids])
        sent = collective_bytes(compiled.as_text(), NUM_DEVICES)
        figures[name] = {"bytes_sent": sum(sent.values()), "bytes_by_kind": sent}
        if name == "ours":  # its loop over rounds is in the program once
            rounds = int(jax.jit(_on(mesh, partial(_rounds, placement), P(AXES), ()))(array, ids_N))
            figures[name] |= {"rounds": rounds, "bytes_sent": rounds * sum(sent.values())}
        runs[name] = partial(lambda f, x: jax.block_until_ready(f(x, ids_N)), compiled, array)
    secs = interleaved(runs, repeats)
    for name in runs:
        figures[name]["ms"] = float(1e3 * np.median(secs[name]))
        figures[name]["gather_bytes_over_this"] = (
            figures["gather"]["bytes_sent"] / figures[name]["bytes_sent"]
        )
    return figures | {
        "rows": NUM_ROWS,
        "dim": DIM,
        "lookups": NUM_LOOKUPS,
        "unique_ids": len(np.unique(ids)),
        "num_devices": NUM_DEVICES,
    }


def _on(mesh, lookup, table_spec, out_axes=("data",)):
    return jax.shard_map(
        lookup, mesh=mesh, in_specs=(table_spec, P("data")), out_specs=P(*out_axes), check_vma=False
    )


def _gather(table_VD, ids_N):
    """Plain indexing, as XLA partitions it."""
    return table_VD[ids_N]


def _psum_scatter(table_vD, ids_n):
    """Each device looks up all ids, with zeros for entries of other shards; a reduce-scatter sums them."""
    ids_N = jax.lax.all_gather(ids_n, "data", tiled=True)
    local_N = ids_N - jax.lax.axis_index("data") * table_vD.shape[0]
    is_here_N = (local_N >= 0) & (local_N < table_vD.shape[0])
    rows_ND = jnp.where(is_here_N[:, None], table_vD.at[local_N].get(mode="clip"), 0)
    return jax.lax.psum_scatter(rows_ND, "data", tiled=True)


def _read(placement, table_vD, ids_n):
    unique = dedupe_physical(placement, ids_n)
    capacity = ids_n.size // NUM_DEVICES  # an even share of all ids
    return unique, *read_sharded(None, table_vD, None, unique.entry_ids_U, capacity)


def _exchange(placement, table_vD, ids_n):
    """Sends only distinct ids to the devices that own their entries, which send the entries back."""
    unique, rows_UD, _ = _read(placement, table_vD, ids_n)
    return rows_UD[unique.local_ids_N]


def _rounds(placement, table_vD, ids_n):
    return _read(placement, table_vD, ids_n)[2]
