"""What a training has left behind, and whether it belongs to the placement that is there now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plop_dist.errors import ScoresError
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.made_from import MARK, is_current, placement_mark
from plop_dist.values.files import read_json, write_json


class _Summary(BaseModel):
    """What is shown of a summary, as what it must be; more may be there."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    method: str | None = None
    num_steps: Annotated[int, Field(ge=0, le=2**53)] | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    reward_first: float | None = None
    reward_last: float | None = None
    num_rows: float | None = None
    num_epochs: float | None = None
    num_held_out_rows: float | None = None
    adapter: str | None = None
    engine: str | None = None
    launch: str | None = None
    note: str | None = None
    job: dict[str, str] | None = None


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
    try:
        _Summary.model_validate(summary, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where, found = ".".join(map(str, first["loc"])), repr(first["input"])[:80]
        raise ScoresError(f"{path}: {where}: {first['msg']}, found {found}; {remedy}.") from error
    return Trained(summary, is_current(run_dir, path))
