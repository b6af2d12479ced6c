from dataclasses import dataclass, field
import numpy as np


@dataclass(frozen=True)
class InteractionLog:
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    ratings: np.ndarray | None
    user_ids: np.ndarray
    item_ids: np.ndarray
    features: dict = field(default_factory=dict)
