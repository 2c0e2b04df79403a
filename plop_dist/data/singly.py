"""Samples that are read one by one, each in a pass of its own: what they are beyond a line of text says how."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from plop_dist.measure.protocols import MicroBatch


class ReadSingly(Sequence[list[int]]):
    """The token ids of such samples. In a pass with one sample every vector is that sample's, whatever its shape.

    digest: what tells from others whatever the token ids do not tell.
    """

    digest: str = ""

    def __init__(self, ids: Sequence[list[int]]) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        return self._ids[index]

    @property
    def longest(self) -> int:
        """The tokens of the longest text that the model reads in one piece."""
        return max(map(len, self._ids))

    def check_uniform(self) -> None:
        """Raise DataError where forward passes that are collective over replicas would not run the same modules."""

    @abstractmethod
    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Return one sample as a micro-batch, or where there is none a filler that counts for nothing."""
