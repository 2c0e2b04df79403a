"""What an engine's job has left on disk: its last checkpoint, and the numbers of its steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plop_dist.values.names import natural_key


def latest_folder(directory: Path, pattern: str) -> Path | None:
    """Return the folder of the highest number that the pattern finds, or None."""
    found = sorted((path for path in directory.glob(pattern) if path.is_dir()), key=lambda path: natural_key(path.name))
    return found[-1] if found else None


def logged_steps(path: Path, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one log entry per step from a file of `{"step": ..., "data": {...}}` lines.

    columns: the name in our log -> the engine's. Steps without a reward are left out (a validation's, say).
    """
    steps = {}
    for line in _lines(path):
        step, data = line.get("step"), line.get("data")
        if not isinstance(step, int) or not isinstance(data, dict):
            continue
        entry = {name: number for name, key in columns.items() if (number := _number(data.get(key))) is not None}
        if "reward" in entry:
            steps[step] = {"step": step, **entry}
    return [steps[step] for step in sorted(steps)]


def mean_of(path: Path, key: str) -> float | None:
    """Return the mean of a number over the lines of a file, where a line may hold a list of one; None without any."""
    values = [line.get(key) for line in _lines(path)]
    numbers = [_number(value[0] if isinstance(value, list) and len(value) == 1 else value) for value in values]
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                tree = json.loads(line)
            except ValueError:  # cut off where the job was killed
                continue
            if isinstance(tree, dict):
                yield tree


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
