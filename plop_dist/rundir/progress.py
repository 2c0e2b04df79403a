"""What scoring has done so far on disk, so that a restarted job goes on from the last completed micro-batch.

Each rank keeps its own sums of every step in RUN_DIR/progress/FINGERPRINT/; a step counts as done when every rank
has it. The fingerprint covers whatever the sums depend on, so that sums of another model, data or layout never mix.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plop_dist.errors import ScoresError
from plop_dist.values.files import make_folder
from plop_dist.values.sample_totals import SampleTotals

DIRECTORY = "progress"


def fingerprint(parts: Any) -> str:
    """Return a short hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class ProgressLog:
    """The finished steps of one rank. `directory` None keeps nothing (a plugin call, a benchmark)."""

    def __init__(self, run_dir: Path | None, key: str, rank: int) -> None:
        self._directory = None if run_dir is None else run_dir / DIRECTORY / key
        self._rank = rank

    def num_done(self) -> int:
        """Return how many steps, counted from the first without a gap, this rank has on disk."""
        step = 0
        while self._directory is not None and self._file(step).is_file():
            step += 1
        return step

    def read(self, num_steps: int) -> list[SampleTotals]:
        """Return this rank's sums of the first steps. Raises ScoresError if a file is damaged."""
        return [SampleTotals.read(self._file(step)) for step in range(num_steps)]

    def write(self, step: int, totals: SampleTotals) -> None:
        """Keep this rank's sums of one step. Raises RunDirError."""
        if self._directory is not None:
            path = self._file(step)
            make_folder(path.parent, path.parent.parent.parent)
            totals.write(path)

    def _file(self, step: int) -> Path:
        if self._directory is None:
            raise ScoresError("this progress log keeps nothing")
        return self._directory / f"rank-{self._rank:05d}-step-{step:06d}.safetensors"


def clear(run_dir: Path) -> None:
    """Remove all progress, once the scores that it led to are written."""
    shutil.rmtree(run_dir / DIRECTORY, ignore_errors=True)


def hash_samples(samples: Sequence[Sequence[int]]) -> str:
    """Return a hash of the token ids, by which progress on other rows is told apart."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(list(sample)).encode())
    return digest.hexdigest()[:16]
