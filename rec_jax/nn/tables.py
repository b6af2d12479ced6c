"""Several embedding tables, each with its own dim, layout and optimizer, in one training step.

    adagrad = optax.chain(scale_by_rowwise_rss(), optax.scale(-0.05))
    tables = Tables({
        "items": Table(RowSharded(10_000_000, mesh), adagrad),
        "tags": Table(Replicated(500, mesh), optax.sgd(0.1)),
    })
    arrays = tables.place({"items": items_VD, "tags": tags_VD})
    states = tables.init(arrays)

    def step(arrays, states, batch):  # on what one device has
        ids = {"items": {"history": batch.items, "targets": batch.targets}, "tags": batch["tags"]}
        rows, places, touched, rounds = tables.read(arrays, states, ids)
        loss, grads = jax.value_and_grad(loss_sum)(rows, places)  # rows["tags"][places["tags"]] is a lookup
        touched, grads = tables.sum_grads(touched, grads)
        arrays, states, squares = tables.update(arrays, states, touched, grads)
        return arrays, states, jax.lax.psum(loss, "data")

    specs = (tables.specs, tables.state_specs(states))
    in_specs, out_specs = (*specs, P("data")), (*specs, P())
    step = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings(mesh, out_specs))

To clip, or to divide by a number of tokens, scale what `sum_grads` returns; `sum_squares` is for the norm.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from rec_jax.nn.layouts import Replicated
from rec_jax.nn.sparse import RowOptimizer


@dataclass(frozen=True)
class Table:
    layout: Replicated
    optimizer: optax.GradientTransformation | RowOptimizer


@dataclass(frozen=True)
class Tables:
    """Named tables. Every dict that these methods take and return has all of the names.

    The methods from `read` on work inside a shard_map over both axes, on what one device has, the others on
    whole arrays.
    """

    tables: dict[str, Table]

    def __post_init__(self):
        if len({table.layout.mesh for table in self.tables.values()}) != 1:
            raise ValueError(f"tables={sorted(self.tables)} must be at least one, all on one mesh (Tables)")

    def place(self, whole: dict) -> dict:
        """The arrays on the mesh. whole: tables [V, D] in the order of ids.

        Raises: ValueError if a table has not the rows that its layout says.
        """
        self._check_names("whole", whole)
        return {name: table.layout.place(whole[name]) for name, table in self.tables.items()}

    def init(self, arrays: dict) -> dict:
        """The states of the optimizers."""
        return {name: table.layout.init(table.optimizer, arrays[name]) for name, table in self.tables.items()}

    def unplace(self, arrays: dict) -> dict:
        """The tables in the order of ids; `layout.catch_up` goes before where rows miss steps."""
        return {name: table.layout.unplace(arrays[name]) for name, table in self.tables.items()}

    @property
    def specs(self) -> dict:
        """How the arrays lie on the mesh, for a shard_map."""
        return {name: table.layout.spec for name, table in self.tables.items()}

    def state_specs(self, states: dict) -> dict:
        return {name: table.layout.state_specs(states[name]) for name, table in self.tables.items()}

    def read(self, arrays: dict, states: dict, ids: dict) -> tuple[dict, dict, dict, dict]:
        """(rows, places, touched, rounds) of all lookups of a step, each distinct row of a table read once.

        ids: of each table, a pytree of int32 arrays, 0 = padding. One outside the table reads as NaN. Where a
        step has nothing to look up, a zero will do.

        Returns:
          rows: f32[U, D] of each table, what a loss is differentiated with respect to.
          places: the pytrees of ids, as places in the rows.
          touched: which rows these are, for `sum_grads`.
          rounds: int32 scalars, see `layouts.Read`.

        Raises: ValueError for names that are no table's or are missing, and for ids of other types.
        """
        self._check_names("ids", ids)
        reads, places = {}, {}
        for name, table in self.tables.items():
            types = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(ids[name])})
            if types != ["int32"]:
                raise ValueError(f"ids[{name!r}] must be int32 arrays, at least one, not {types} (Tables)")
            flat_N, unravel = ravel_pytree(ids[name])
            ids_N = jnp.concatenate([jnp.zeros(1, jnp.int32), flat_N])  # layouts want padding among the ids
            reads[name] = table.layout.read(table.optimizer, arrays[name], states[name], ids_N)
            places[name] = unravel(reads[name].place_N[1:])
        rows = {name: read.rows_UD for name, read in reads.items()}
        touched = {name: read.touched for name, read in reads.items()}
        return rows, places, touched, {name: read.rounds for name, read in reads.items()}

    def sum_grads(self, touched: dict, grads: dict) -> tuple[dict, dict]:
        """(touched, grads) for `update`: summed over devices, unless it is the owners of rows who sum.

        touched: from `read`. grads: of its `rows`.
        """
        sums = {
            name: table.layout.sum_grads(touched[name], grads[name]) for name, table in self.tables.items()
        }
        return {name: x for name, (x, _) in sums.items()}, {name: x for name, (_, x) in sums.items()}

    def sum_squares(self, touched: dict, grads: dict) -> jax.Array:
        """f32 scalar: the sum of all squared gradients, at the price of an exchange where rows are spread.

        touched, grads: from `sum_grads`.
        """
        return sum(
            table.layout.sum_squares(touched[name], grads[name]) for name, table in self.tables.items()
        )

    def update(self, arrays: dict, states: dict, touched: dict, grads: dict) -> tuple[dict, dict, jax.Array]:
        """(arrays, states, sum of all squared gradients) after one step on the touched rows.

        touched, grads: from `sum_grads`. Row 0 is always among the touched.
        """
        new = {
            name: table.layout.update(table.optimizer, arrays[name], states[name], touched[name], grads[name])
            for name, table in self.tables.items()
        }
        arrays, states, squares = ({name: x[i] for name, x in new.items()} for i in range(3))
        return arrays, states, sum(squares.values())

    def _check_names(self, what: str, given: dict):
        if given.keys() != self.tables.keys():
            raise ValueError(
                f"{what} of {sorted(given)} must be of all tables: {sorted(self.tables)} (Tables)"
            )
