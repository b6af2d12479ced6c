"""Schema: the kind of each feature of a log, its normalisation, and its value where no event is known."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Feature:
    """A column of events other than the item.

    kind: "id" is an int32 in 1..num_ids, 0 = missing; "number" is a normalised f32; "time" is int32 seconds
    since the first event of the segment.
    is_outcome: whether the value is known only after the event (a rating, a dwell time). It would reveal the
    answer, so it is hidden wherever the item is hidden. The other features are context, known when a
    recommendation is requested (a device, a time); a batch also has them for the next event, in `Batch.next`.
    values: the texts of the ids of kind "id", values[0] == "". mean, std: of the training events, of kind
    "number".
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
        """0, the value for tokens without a known event and for missing values: no id, the mean of a number,
        or the start of the segment."""
        return self.dtype(0)

    def encode(self, values) -> np.ndarray:
        """Converts a column of `Histories` to the values that a model reads. Packing converts times."""
        if self.kind != "number":
            return values
        scaled = (np.asarray(values, np.float64) - self.mean) / self.std
        return np.where(np.isnan(scaled), self.missing, scaled).astype(np.float32)


Schema = tuple[Feature, ...]
TIME = Feature("time", "time", is_outcome=False)


def make_schema(histories, split, context: tuple[str, ...] = ()) -> Schema:
    """Returns the features of a log: its times, if it has any, and its other columns.

    context: the features that are known when a recommendation is requested. Means and standard deviations are
    computed from the training events only.
    Raises ValueError if a name in context is not a feature.
    """
    if unknown := set(context) - set(histories.features):
        raise ValueError(
            f"context={context}: {', '.join(sorted(unknown))} not in the features "
            f"({', '.join(histories.features) or 'none'}): add the column to data.features (DataConfig)"
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
