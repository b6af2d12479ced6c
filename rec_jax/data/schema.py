"""The columns of a log: their kind, how they are normalised, and their value where there is no event."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Feature:
    """A column of events, beside the item.

    kind: "id" is an int32 code in 1..num_ids, 0 where missing; "number" is f32, normalised; "time" is int32
    seconds since the first event of the segment.
    is_outcome: known only once the event has happened (a rating, a dwell time), so it gives the answer away
    and is hidden wherever the item is. What is known when a recommendation is requested (a device, a time) is
    context: a batch also has it of the next event, in `Batch.next`.
    values: the texts of the codes, values[0] == "" (for "id"). mean, std: of the training events ("number").
    """

    name: str
    kind: Literal["id", "number", "time"]
    is_outcome: bool = True
    values: tuple[str, ...] = field(default=(), repr=False)
    mean: float = 0.0
    std: float = 1.0

    @property
    def num_ids(self) -> int:
        return len(self.values) - 1

    @property
    def dtype(self):
        return np.float32 if self.kind == "number" else np.int32

    @property
    def missing(self):
        """The value of a token that has no event (yet), and of an event without one: code 0, the mean of a
        number, the start of the segment."""
        return self.dtype(0)

    def encode(self, values) -> np.ndarray:
        """A column of `Histories` as a model reads it; times stay as they are until packing."""
        if self.kind != "number":
            return values
        scaled = (np.asarray(values, np.float64) - self.mean) / self.std
        return np.where(np.isnan(scaled), self.missing, scaled).astype(np.float32)


Schema = tuple[Feature, ...]
TIME = Feature("time", "time", is_outcome=False)


def make_schema(histories, split, context: tuple[str, ...] = ()) -> Schema:
    """The features of a log: its times, where it has any, and its other columns.

    context: names of those that are known when a recommendation is requested. Means and standard deviations
    are those of the training events alone.
    Raises ValueError for a name that no column has.
    """
    if unknown := set(context) - set(histories.features):
        raise ValueError(
            f"context={context}: there is no column {', '.join(sorted(unknown))} among the features "
            f"{', '.join(histories.features) or '(none)'}: add it to data.features (DataConfig)"
        )
    schema = [] if histories.times is None else [TIME]
    for name, column in histories.features.items():
        is_outcome = name not in context
        if name in histories.feature_values:
            schema.append(Feature(name, "id", is_outcome, histories.feature_values[name]))
            continue
        trained = np.asarray(column)[split.in_train(histories)]
        trained = trained[~np.isnan(trained)]
        mean, std = (float(trained.mean()), float(trained.std())) if len(trained) else (0.0, 1.0)
        schema.append(Feature(name, "number", is_outcome, mean=mean, std=std or 1.0))
    return tuple(schema)
