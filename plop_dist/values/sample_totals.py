"""What scoring sums up per module and sample: every mean and every bootstrap resample follows from it exactly."""

# M modules, S samples

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plop_dist.errors import ScoresError
from plop_dist.values.files import array_bytes, read_arrays, write_bytes

SAMPLES_FILE = "samples.safetensors"


@dataclass(frozen=True, eq=False)
class SampleTotals:
    """Sums per module and sample, from which every mean and every bootstrap resample follows exactly.

    fqns: M paths; sample_ids: (S,) int64; gain_total: (M, S) float64, sum of gain over the sample's tokens;
    num_tokens and num_skipped: (M, S) int64.
    """

    fqns: tuple[str, ...]
    sample_ids: np.ndarray
    gain_total: np.ndarray
    num_tokens: np.ndarray
    num_skipped: np.ndarray

    # The generated comparison would ask arrays for one truth value.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleTotals):
            return NotImplemented
        return self.fqns == other.fqns and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("sample_ids", "gain_total", "num_tokens", "num_skipped")
        )

    __hash__ = None  # type: ignore[assignment]

    def write(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write atomically as safetensors. Raises RunDirError."""
        write_bytes(path, self.to_bytes(metadata))

    def to_bytes(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """Return the content of a safetensors file; the paths are kept in its metadata."""
        arrays = {
            "sample_ids": self.sample_ids,
            "gain_total": self.gain_total,
            "num_tokens": self.num_tokens,
            "num_skipped": self.num_skipped,
        }
        return array_bytes(arrays, {**(metadata or {}), "fqns": json.dumps(self.fqns)})

    @classmethod
    def read(cls, path: Path) -> SampleTotals:
        """Return the totals of a file. Raises ScoresError if it is missing or malformed."""
        arrays, metadata = read_arrays(path)
        try:
            totals = cls(fqns=tuple(json.loads(metadata["fqns"])), **arrays)
            totals._check()
            return totals
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ScoresError(f"{path} does not hold sample totals ({error}); score again.") from error

    def _check(self) -> None:
        """Raise ValueError unless these are sums of distinct modules over samples."""
        if not all(isinstance(fqn, str) for fqn in self.fqns) or len(set(self.fqns)) < len(self.fqns):
            raise ValueError("expected distinct paths of modules")
        shape = (len(self.fqns), len(self.sample_ids))
        if self.sample_ids.ndim != 1:
            raise ValueError(f"expected one row of sample_ids, found the shape {self.sample_ids.shape}")
        for name, kind in (("gain_total", "f"), ("num_tokens", "iu"), ("num_skipped", "iu")):
            array = getattr(self, name)
            if array.shape != shape or array.dtype.kind not in kind:
                raise ValueError(f"expected sums of shape {shape}, found {name} of {array.dtype} and {array.shape}")

    def observed(self) -> SampleTotals:
        """Return the totals of the samples that any module has seen a token of (scoring may have stopped early)."""
        seen = (self.num_tokens + self.num_skipped).any(axis=0)
        return SampleTotals(
            self.fqns,
            self.sample_ids[seen],
            self.gain_total[:, seen],
            self.num_tokens[:, seen],
            self.num_skipped[:, seen],
        )

    def select(self, fqns: Iterable[str]) -> SampleTotals:
        """Return the totals of these modules, in this order. Raises ScoresError naming one that is absent."""
        wanted = tuple(fqns)
        index = self.rows_of(wanted)
        return SampleTotals(
            wanted, self.sample_ids, self.gain_total[index], self.num_tokens[index], self.num_skipped[index]
        )

    def rows_of(self, fqns: Iterable[str]) -> np.ndarray:
        """Return the rows of these modules: (N,), int64. Raises ScoresError naming one that is absent."""
        wanted = tuple(fqns)
        if wanted == self.fqns:
            return np.arange(len(wanted))
        row = {fqn: index for index, fqn in enumerate(self.fqns)}
        absent = [fqn for fqn in wanted if fqn not in row]
        if absent:
            raise ScoresError(f"{SAMPLES_FILE} has no module '{absent[0]}' that scores.json lists; score again.")
        return np.array([row[fqn] for fqn in wanted], dtype=np.int64)
