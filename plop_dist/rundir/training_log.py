"""What train/log.jsonl says: a step and numbers per line, each parsed as what it must be, or the line is not read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_LAST_STEP = 2**53  # what a JSON reader keeps exactly


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the entries of a log, and how many lines are unreadable, as the last one is after a crash.

    A resumed run repeats the steps since its last checkpoint: what it logs last of a step counts.
    """
    if not path.is_file():
        return [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    entries = [parse_entry(line) for line in lines if line.strip()]
    last = {(entry["step"], frozenset(entry)): entry for entry in entries if entry is not None}
    return list(last.values()), entries.count(None)


def parse_entry(line: str) -> dict[str, Any] | None:
    """Return the entry of one line, or None where anything in it is not what it must be.

    That is: `step`, a whole number from 0; `nfn`, numbers by type; everything else a number. Numbers that are not
    finite, as of a training that diverges, are left out, and so is null.
    """
    try:
        tree = json.loads(line)
        if not isinstance(tree, dict) or not _is_step(tree.get("step")):
            return None
        entry: dict[str, Any] = {"step": tree.pop("step")}
        nfn = tree.pop("nfn", None)
        if nfn is not None:
            entry["nfn"] = _numbers(nfn)
        return entry | _numbers(tree)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LAST_STEP


def _numbers(tree: Any) -> dict[str, float]:
    """Return the finite numbers of a mapping. Raises TypeError for what is none, ValueError for a name that hides."""
    if not isinstance(tree, dict):
        raise TypeError("expected names and numbers")
    found = {}
    for name, value in tree.items():
        if not name.isprintable():
            raise ValueError("a name holds characters that are not seen")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError("expected a number")
        if math.isfinite(float(value)):
            found[name] = value
    return found
