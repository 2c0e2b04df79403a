"""What was made from an older placement: each export, the training and the report keep a mark of theirs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from plop_dist.rundir.layout import RunDir
from plop_dist.values.files import content_hash

MARK = "placement"  # the key of the mark in a JSON record; in the report the name of a meta element
_META = re.compile(rf'<meta name="plop-dist-{MARK}" content="([^"]*)">')
_HEAD_BYTES = 4096  # of the report, where its mark stands


@dataclass(frozen=True)
class Outdated:
    """name: of what was made, below the run directory. command: the arguments of plop-dist that make it again."""

    name: str
    command: tuple[str, ...] | None


def placement_mark(run_dir: RunDir) -> str:
    """Return the mark of the placement that is there now."""
    return content_hash(run_dir.placement) or "none"


def is_current(run_dir: RunDir, record: Path) -> bool:
    """Tell whether what a record belongs to was made from the placement that is there now, or says nothing of it."""
    mark = _read_mark(record)
    return mark is None or mark == placement_mark(run_dir)


def outdated(run_dir: RunDir) -> list[Outdated]:
    """Return what was made from an older placement and is still there: exports, training, report."""
    found = []
    for record in sorted(run_dir.exports.glob("*/export.json")):
        target = record.parent.name
        if not is_current(run_dir, record):
            found.append(Outdated(f"exports/{target}", ("export", str(run_dir.path), "--to", target)))
    if not is_current(run_dir, run_dir.training_summary):
        again = ("run", str(run_dir.config), f"run_dir={run_dir.path}")  # it may have been moved since
        found.append(Outdated("train", again if run_dir.config.is_file() else None))
    if not is_current(run_dir, run_dir.report):
        found.append(Outdated("report.html", ("report", str(run_dir.path))))
    return found


def made_from_scores(run_dir: RunDir) -> list[str]:
    """Return what is there of all that is drawn from the scores, directly or by way of a placement."""
    exports = sorted(f"exports/{record.parent.name}" for record in run_dir.exports.glob("*/export.json"))
    there = {"placement.json": run_dir.placement, "train": run_dir.training_summary, "report.html": run_dir.report}
    found = [name for name, path in there.items() if path.is_file()]
    return [*found[:1], *exports, *found[1:]] if "placement.json" in found else found


def _read_mark(record: Path) -> str | None:
    if not record.is_file():
        return None
    if record.suffix == ".html":
        with record.open("rb") as handle:
            found = _META.search(handle.read(_HEAD_BYTES).decode("utf-8", errors="replace"))
        return found[1] if found else None
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # whoever reads the record says what is wrong with it
        return None
    mark = tree.get(MARK) if isinstance(tree, dict) else None
    return mark if isinstance(mark, str) else None
