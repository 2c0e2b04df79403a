"""A tiny model with data and a configuration, and the command line run in this process, as a user would see it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from plop_dist.cli import main

RESULTS = ("scores.json", "samples.safetensors", "placement.json", "exports", "report.html")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit status and both streams."""

    status: int
    out: str
    err: str


def plop_dist(*arguments: Any) -> Outcome:
    """Run `plop-dist ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    command = ["plop-dist", *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", command):
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


def assert_one_message(outcome: Outcome, *parts: str) -> None:
    """Assert exit status 2 and exactly one message, last of all, that has these parts; no traceback."""
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    assert outcome.err.count("error:") == 1, outcome.err
    message = outcome.err[outcome.err.index("error:") :].strip()
    for part in parts:
        assert part in message, message
    assert "\n" not in message, message


def write_case(directory: Path, model: Path, num_rows: int = 8, **sections: dict[str, Any]) -> Path:
    """Write data.jsonl and config.yaml into the directory and return the configuration's path."""
    rows = [{"question": f"{'what is it and ' * (row % 3 + 1)}{row}", "answer": str(row)} for row in range(num_rows)]
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "run_dir": str(directory / "run"),
        "model": {"name_or_path": str(model)},
        "data": {"path": str(data), "template": "{question} {answer}", "batch_size": 2},
        "estimator": {"num_directions": 8},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def results(run_dir: Path) -> dict[str, bytes]:
    """Return the content of every result below the run directory."""
    files = [path for name in RESULTS for path in [run_dir / name, *(run_dir / name).rglob("*")] if path.is_file()]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the run's events, oldest first."""
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def modules_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the modules of scores.json."""
    return json.loads((run_dir / "scores.json").read_text())["modules"]
