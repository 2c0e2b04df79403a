"""RUN_DIR/report.html: one page with the choice, its reasons and the training, that opens without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plop_dist.choose.decision import decide_for
from plop_dist.choose.diagnostics import diagnose
from plop_dist.choose.explain import explain
from plop_dist.choose.sweep import sweep, sweep_of
from plop_dist.config.loading import parse_section
from plop_dist.config.schema import PlacementConfig
from plop_dist.registry import missing_extra
from plop_dist.report import figures
from plop_dist.report.redact import redact
from plop_dist.report.spread import folded_types
from plop_dist.report.terminal import interval_text, percent, short_list
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.made_from import placement_mark
from plop_dist.rundir.trained import read_trained
from plop_dist.values.files import write_text
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores


def write_report(run_dir: RunDir) -> Path:
    """Write report.html into a run directory and return its path.

    Reads scores.json (required) and samples.safetensors, placement.json, train/log.jsonl, train/summary.json,
    config.yaml and command.txt where they exist. plotly.js is part of the page; secrets are left out of it.
    Raises ScoresError for a file that is missing or malformed, ConfigError for the policy of a placement that cannot be
    read, MissingExtraError without plotly or jinja2.
    """
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise missing_extra(error, "plop-dist report") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("plop_dist.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(interval=interval_text, percent=percent, short_list=short_list)
    template = environment.get_template("report.html.j2")
    write_text(run_dir.report, template.render(plotly_js=Markup(get_plotlyjs()), **build_context(run_dir)))
    return run_dir.report


def build_context(run_dir: RunDir) -> dict[str, Any]:
    """Return everything the template shows, without secrets. Raises ScoresError as write_report does."""
    placement = Placement.from_file(run_dir.placement) if run_dir.placement.is_file() else None
    scores = placement.source if placement is not None else Scores.from_file(run_dir.scores)
    context: dict[str, Any] = {
        "scores": redact(scores.model_dump(mode="json", by_alias=True, exclude={"modules", "left_out"})),
        "num_modules": len(scores.modules),
        "placement_mark": placement_mark(run_dir),
        "folded": folded_types(scores),
        **_choice(run_dir, scores, placement),
        **_training(run_dir),
        "config": redact(_read_text(run_dir.config)),
        "command": redact(_read_text(run_dir.command)),
    }
    charts = {
        "types": figures.types_figure(scores, placement),
        "heatmap": figures.heatmap_figure(scores),
        "folded": figures.folded_figure(context["folded"]),
        "samples": figures.samples_figure(context["sweep"]) if context["sweep"].by_samples else None,
        **context.pop("training_charts"),
    }
    return {**context, "charts": redact({name: chart for name, chart in charts.items() if chart is not None})}


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


def _training(run_dir: RunDir) -> dict[str, Any]:
    """Return what the page says of the training; nothing of one that belongs to an earlier placement."""
    trained = read_trained(run_dir)
    is_earlier = trained is not None and not trained.is_of_placement
    summary = None if trained is None or is_earlier else trained.summary
    log, num_unreadable = _read_log(run_dir.training_log)
    if is_earlier:
        log = []
    return {
        "training": redact(summary),
        "is_of_earlier_placement": is_earlier,
        "num_unreadable": num_unreadable,
        "training_charts": {
            "loss": figures.training_figure([*log, *_held_out(summary)], "loss", "loss", held_out=True),
            "reward": figures.training_figure(log, "reward", "reward"),
            "nfn": figures.tracked_nfn_figure(log),
        },
    }


def _read_log(path: Path) -> tuple[list[Mapping[str, Any]], int]:
    """Return the log's entries and how many lines are unreadable, as the last one is after a crash.

    A resumed run repeats the steps since its last checkpoint: what it logs last of a step counts.
    """
    entries: list[Mapping[str, Any]] = []
    num_unreadable = 0
    for line in (_read_text(path) or "").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            num_unreadable += 1
    last = {(entry.get("step"), frozenset(entry)): entry for entry in entries}
    return list(last.values()), num_unreadable


def _held_out(summary: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the held-out losses before and after training as entries of a log."""
    if summary is None or not isinstance(summary.get("num_steps"), int):
        return []
    at = {0: "held_out_before", summary["num_steps"]: "held_out_after"}
    return [{"step": step, "held_out_loss": summary.get(name)} for step, name in at.items()]


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None
