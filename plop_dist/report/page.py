"""RUN_DIR/report.html: one page with the choice, its reasons and the training; needs no network and no script."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from plop_dist.choose.bootstrap import NUM_RESAMPLES
from plop_dist.choose.decision import decide_for
from plop_dist.choose.diagnostics import diagnose
from plop_dist.choose.explain import explain
from plop_dist.choose.sweep import sweep, sweep_of
from plop_dist.config.loading import parse_section
from plop_dist.config.schema import PlacementConfig
from plop_dist.report import figures, paste
from plop_dist.report.closing import command_text
from plop_dist.report.forest import comparison_of
from plop_dist.report.module_rows import module_rows, num_rows_left_out
from plop_dist.report.panels import folded_panels, samples_panel
from plop_dist.report.redact import redact
from plop_dist.report.spread import MOST_ONE_BY_ONE, folded_types
from plop_dist.report.terminal import (
    CONFIDENCE_MEANS,
    NFN_MEANS,
    PROBABILITY_MEANS,
    interval_text,
    percent,
    short_list,
)
from plop_dist.report.training import training_of
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.made_from import outdated, placement_mark
from plop_dist.values.files import LINKED, refuse_links, write_text
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores
from plop_dist.values.visible import visible

_PARTS = {"style": "style.css", "script": "page.js"}  # of the page, each in a template of its own


def write_report(run_dir: RunDir) -> Path:
    """Write report.html into a run directory and return its path.

    Reads scores.json (required) and samples.safetensors, placement.json, train/log.jsonl, train/summary.json,
    compare.json, config.yaml and command.txt where they exist. Secrets are left out of it.
    Raises ScoresError for a file that is missing or malformed, ConfigError for the policy of a placement that cannot be
    read, RunDirError for a link: what it leads to is not the run's, and the page is passed on.
    """
    refuse_links(run_dir.path, besides=LINKED)
    environment = page_environment()
    parts = {name: environment.get_template(f"{file}.j2").render() for name, file in _PARTS.items()}
    page = environment.get_template("report.html.j2").render(
        **{name: Markup(text) for name, text in parts.items()},
        hashes={name: _hash(text) for name, text in parts.items()},
        **build_context(run_dir),
    )
    write_text(run_dir.report, page)
    return run_dir.report


def page_environment() -> jinja2.Environment:
    """Return what renders the page's templates, with their filters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("plop_dist.report", "templates"),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        interval=interval_text,
        percent=percent,
        short_list=short_list,
        rounded=rounded,
        label=label,
        command=lambda arguments: command_text(*arguments),
    )
    return environment


def build_context(run_dir: RunDir) -> dict[str, Any]:
    """Return everything the template shows. Raises ScoresError as write_report does."""
    placement = Placement.from_file(run_dir.placement) if run_dir.placement.is_file() else None
    scores = placement.source if placement is not None else Scores.from_file(run_dir.scores)
    folded, choice, training = folded_types(scores), _choice(run_dir, scores, placement), training_of(run_dir)
    pasted = [] if placement is None else paste.pastes(placement)
    return {
        "scores": redact(scores.model_dump(mode="json", by_alias=True, exclude={"modules", "left_out"})),
        "placement_mark": placement_mark(run_dir),
        "means": {"nfn": NFN_MEANS, "confidence": CONFIDENCE_MEANS, "probability": PROBABILITY_MEANS},
        "num_modules": len(scores.modules),
        "num_resamples": NUM_RESAMPLES,
        **choice,
        "run_dir": str(run_dir.path),
        "pastes": pasted,
        "other_targets": paste.other_targets(),
        "next_step": paste.next_step(run_dir, placement, pasted, training.summary),
        "is_of_older_scores": placement is not None and placement.is_of_older_scores,
        "outdated": [entry for entry in outdated(run_dir) if entry.name != run_dir.report.name],
        "training": redact(training.summary),
        "comparison": comparison_of(run_dir, scores),
        "held_out_label": training.held_out_label,
        "num_unreadable": training.num_unreadable,
        "folded": folded,
        "modules": module_rows(scores, placement),
        "num_rows_left_out": num_rows_left_out(scores),
        "most_one_by_one": MOST_ONE_BY_ONE,
        "config": _read_text(run_dir.config),
        "command": _read_text(run_dir.command),
        "charts": {
            "types": figures.types_figure(scores, placement),
            "heatmap": figures.heatmap_figure(scores, placement),
            "folded": folded_panels(folded),
            "samples": samples_panel(choice["sweep"]),
            "training": training.panels,
        },
    }


def rounded(value: Any) -> str:
    """Return a value of whatever kind as a person reads it: four digits of a fraction, thousands apart.

    >>> rounded(1.31115465), rounded(1234567), rounded({"load": 2.5, "ranks": [0, 1]}), rounded(None)
    ('1.311', '1,234,567', 'load: 2.5, ranks: 0, 1', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {rounded(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(rounded, value))
    return str(value)


def label(key: str) -> str:
    """Return a field's name as a person reads it.

    >>> label("num_held_out_rows")
    'held out rows'
    """
    return key.removeprefix("num_").replace("_", " ")


def _choice(run_dir: RunDir, scores: Scores, placement: Placement | None) -> dict[str, Any]:
    """Return what the page says of the choice, or of what there is to choose from."""
    if placement is None:
        nothing = {"placement": None, "num_chosen": 0, "explanation": None}
        return {**nothing, "diagnostics": diagnose(scores), "sweep": sweep(scores)}
    policy = parse_section(PlacementConfig, placement.policy, source=f"{run_dir.placement}: policy")
    decision = decide_for(scores, policy)
    return {
        "placement": redact(placement.model_dump(mode="json", exclude={"modules"})),
        "num_chosen": len(placement.modules),
        "explanation": explain(scores, placement, decision),
        "diagnostics": diagnose(scores, placement, decision),
        "sweep": sweep_of(decision),
    }


def _shown(value: Any) -> Any:
    """Return what the page shows of a value, whatever part of it that is in: no secret, no character that hides."""
    return visible(redact(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def _hash(text: str) -> str:
    """Return by what the page's own security policy knows its script: none that a name may bring along runs."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None
