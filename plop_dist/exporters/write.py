"""Writes an export: what a pure exporter returned goes to RUN_DIR/exports/TARGET, and its flags beside it."""

from __future__ import annotations

from pathlib import Path

from plop_dist.exporters.exporter import find_exporter
from plop_dist.values.files import make_folder, write_json, write_text
from plop_dist.values.placement import Export, Placement


def write_export(
    placement: Placement, target: str, directory: Path, *, engine: str | None, widen: bool, mark: str | None = None
) -> Export:
    """Export a placement and write its files below directory/target. Returns what was exported.

    mark: of the placement's file, kept with the export, by which it is seen when it has become another.

    Raises ConfigError for an unknown target, ExportError for what the target cannot express, RunDirError.
    """
    export = find_exporter(target).export(placement, engine=engine, widen=widen)
    make_folder(directory / target, directory.parent)
    for name, content in export.files.items():
        write_text(directory / target / name, content)
    record = {key: list(getattr(export, key)) for key in ("flags", "notes", "widened", "warnings")}
    write_json(directory / target / "export.json", record | ({} if mark is None else {"placement": mark}))
    return export
