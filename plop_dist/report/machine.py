"""What commands say to programs (--json): one object each, with keys that stay."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plop_dist.choose.diagnostics import Diagnostic
from plop_dist.choose.two_runs import RunsDifference
from plop_dist.exporters.diff import Difference
from plop_dist.exporters.fits import Fit
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.made_from import outdated
from plop_dist.values.placement import Export, Placement
from plop_dist.values.visible import say

if TYPE_CHECKING:
    from plop_dist.costs.plan import Plan  # which imports torch


def tell(kind: str, **fields: Any) -> None:
    """Print one JSON object on stdout: its schema, then the fields."""
    say(json.dumps({"schema": f"plop-dist/{kind}/1", **fields}, indent=2, ensure_ascii=True))


def checked(plan: Plan, config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return what `check --json` says; sizes are bytes, counts of parameters are the whole model's."""
    verdict = plan.verdict
    return {
        "ok": verdict.is_ok,
        "problems": list(verdict.problems),
        "warnings": list(verdict.warnings),
        "notes": list(plan.notes),
        "model": {
            "name_or_path": plan.model,
            "architecture": plan.architecture,
            "num_parameters": plan.num_parameters,
            "dtype": plan.dtype,
        },
        "parallel": {"layout": plan.layout, "world_size": plan.world_size},
        "data": asdict(plan.data),
        "types": [asdict(entry) for entry in plan.types],
        "stages": [
            {
                "index": stage.index,
                "num_ranks": stage.num_ranks,
                "num_modules": len(stage.modules),
                "weight_bytes": stage.weight_bytes,
                "activation_bytes": stage.activation_bytes,
                "scoring": asdict(stage.scoring),
                "gathers": asdict(stage.gathers),
            }
            for stage in plan.stages
        ],
        "placement": {"choice": verdict.choice, "num_trainable_parameters": verdict.parameters},
        "training": None if plan.training is None else {**asdict(plan.training), "total": plan.training.total},
        "exports": list(verdict.exports),
        "would_run": dict(stage.split(": ", 1) for stage in verdict.stages),
        "next": _command("run", config, *overrides) if verdict.is_ok else None,
    }


def placed(paths: RunDir, placement: Placement, findings: Iterable[Diagnostic], dry_run: bool) -> dict[str, Any]:
    """Return what `place --json` says: the placement without its list of modules, which the file has."""
    findings = list(findings)
    return {
        "file": None if dry_run else str(paths.placement),
        **placement.model_dump(mode="json", by_alias=True, exclude={"modules", "schema_", "diagnostics"}),
        "num_modules": len(placement.modules),
        "types": [entry.model_dump(mode="json") for entry in placement.source.types],
        "warnings": [
            *(finding.text for finding in findings if finding.severity == "warning"),
            *(f"{item.name} was made from an older placement" for item in ([] if dry_run else outdated(paths))),
        ],
        "notes": [finding.text for finding in findings if finding.severity == "note"],
        "next": _command("export", paths.path, "--to", "peft"),
    }


def exported(run_dir: Path, directory: Path, export: Export, placement: Placement) -> dict[str, Any]:
    """Return what `export --json` says: files, what to paste, what is adapted beyond the placement, or lost."""
    return {
        "target": export.target,
        "files": [str(directory / name) for name in export.files],
        "flags": list(export.flags),
        "warnings": [
            *export.widened,
            *export.warnings,
            *(["placement.json was made from older scores"] if placement.is_of_older_scores else []),
        ],
        "notes": list(export.notes),
        "next": _command("report", run_dir),
    }


def fitted(run_dir: Path, found: Iterable[Fit]) -> dict[str, Any]:
    """Return what `export --to --json` says: what each target and engine makes of the placement."""
    found = list(found)
    best = next((fit.target for fit in found if fit.verdict == "exact"), None)
    return {
        "targets": [asdict(fit) for fit in found],
        "warnings": [],
        "next": None if best is None else _command("export", run_dir, "--to", best),
    }


def differing(difference: Difference, run_dir: Path) -> dict[str, Any]:
    """Return what `diff --json` says."""
    tree = asdict(difference)
    rows = [dict(zip(("type", "both", "only_placement", "only_config"), row, strict=True)) for row in difference.types]
    warnings = [
        *(f"{name} matches no scored module" for name in difference.unmatched),
        *(f"{name} is trained beside A and B and not counted" for name in difference.uncounted),
    ]
    return {"is_same": difference.is_same, **tree, "types": rows, "warnings": warnings,
            "next": None if difference.is_same else _command("place", run_dir, "--explain")}  # fmt: skip


def runs_differing(difference: RunsDifference) -> dict[str, Any]:
    """Return what `diff --json` says of two runs."""
    return {"is_same": difference.is_same, **asdict(difference), "warnings": [], "next": None}


def failed(error: Exception, status: int) -> Mapping[str, Any]:
    """Return what any command says under --json where it fails."""
    return {"ok": False, "message": str(error), "exit_status": status}


def _command(*words: object) -> str:
    return shlex.join(["plop-dist", *map(str, words)])
