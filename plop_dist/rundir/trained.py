"""What a training has left behind, and whether it belongs to the placement that is there now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plop_dist.errors import ScoresError
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.made_from import MARK, is_current, placement_mark
from plop_dist.values.files import read_json, write_json


@dataclass(frozen=True)
class Trained:
    """summary: what train/summary.json says. is_of_placement: False for the training of an earlier placement."""

    summary: Mapping[str, Any]
    is_of_placement: bool


def write_trained(run_dir: RunDir, summary: Mapping[str, Any]) -> None:
    """Write train/summary.json, with a mark of the placement that was trained. Raises RunDirError."""
    write_json(run_dir.training_summary, {**summary, MARK: placement_mark(run_dir)})


def read_trained(run_dir: RunDir) -> Trained | None:
    """Return what the last finished training has left, or None if there is none. Raises ScoresError."""
    path, remedy = run_dir.training_summary, "run plop-dist run again"
    if not path.is_file():
        return None
    summary = read_json(path, what="training summary", remedy=remedy)
    if not isinstance(summary, dict):
        raise ScoresError(f"{path} holds a {type(summary).__name__}, expected an object; {remedy}.")
    return Trained(summary, is_current(run_dir, path))
