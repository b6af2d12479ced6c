"""Text columns as two arrays, which can be memory-mapped instead of read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Strings(Sequence):
    """A sequence of texts. Text n is the UTF-8 in data[ends[n - 1]:ends[n]], decoded on access.

    data: uint8[bytes]. ends: int64[N].
    """

    data: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Iterable) -> "Strings":
        encoded = [str(text).encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]].tobytes().decode()

    @cached_property
    def index(self) -> dict[str, int]:
        """Returns {text: its number}."""
        return {text: number for number, text in enumerate(self)}

    def to_arrow(self):
        """Returns a pyarrow array without copying the text."""
        import pyarrow as pa

        starts = np.concatenate([[0], self.ends]).astype(np.int64)
        text = np.ascontiguousarray(self.data)
        return pa.LargeStringArray.from_buffers(len(self), pa.py_buffer(starts), pa.py_buffer(text))
