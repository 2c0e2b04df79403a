"""Scores, explanations and sweeps on the terminal: a table where someone looks, plain aligned lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape

from plop_dist.choose.diagnostics import Diagnostic
from plop_dist.choose.explain import Explanation
from plop_dist.choose.sweep import Sweep
from plop_dist.report.grid import Grid, show, show_line
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.trained import read_trained
from plop_dist.values.adapter_size import AdapterSizes
from plop_dist.values.console import VisibleConsole
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores


def print_types(scores: Scores, placement: Placement | None = None, console: Console | None = None) -> None:
    """Print the types, lowest NFN first: NFN, interval, modules and, with a placement, what is chosen at which cost."""
    grid = Grid(f"NFN per module type · {scores.model.name_or_path}", ["type", ">NFN", ">95% interval", ">modules"])
    chosen = {} if placement is None else _chosen_cells(placement)
    if placement is not None:
        grid.headers = [*grid.headers, ">chosen", ">parameters"]
    for entry in scores.types:
        row = [entry.type, f"{entry.nfn:.4f}", interval_text(entry.nfn_ci95), f"{entry.num_modules}"]
        if placement is not None:
            row += chosen.get(entry.type, ("", ""))
            if row[4]:
                grid.highlighted.add(len(grid.rows))
        grid.rows.append(row)
    show(grid, console)
    if placement is not None:
        show_line(_summary(placement), console)


def print_explanation(explanation: Explanation, console: Console | None = None) -> None:
    """Print why each type is in or out, the next-best choice, and the alternatives at matched rank."""
    grid = Grid(
        f"Why · {explanation.rule}",
        ["type", ">NFN", ">95% interval", "in", "reason", ">P(chosen)", ">parameters"],
    )
    for verdict in explanation.verdicts:
        share = "yes" if verdict.num_chosen == verdict.num_modules else f"{verdict.num_chosen}/{verdict.num_modules}"
        if verdict.num_chosen:
            grid.highlighted.add(len(grid.rows))
        grid.rows.append(
            [
                verdict.type,
                f"{verdict.nfn:.4f}",
                interval_text(verdict.interval),
                share if verdict.num_chosen else "no",
                verdict.reason,
                percent(verdict.probability),
                f"{verdict.num_parameters:,}",
            ]
        )
    show(grid, console)
    show_line(f"Confidence: {percent(explanation.confidence)} of bootstrap resamples make the same choice.", console)
    if explanation.next_best:
        show_line(f"Next best: {explanation.next_best}.", console)
    grid = Grid(
        "Alternatives at the same rank", ["choice", "types", ">modules", ">parameters", ">mean NFN", ">P(chosen)"]
    )
    for other in explanation.alternatives:
        types, nfn = " ".join(other.module_types), f"{other.nfn:.4f}"
        counts = [f"{other.num_modules}", f"{other.num_parameters:,}"]
        grid.rows.append([other.name, types, *counts, nfn, percent(other.probability)])
    show(grid, console)


def print_sweep(sweep: Sweep, console: Console | None = None) -> None:
    """Print the choice for every k, and for fewer samples."""
    unit = sweep.granularity
    headers = [f">{sweep.parameter}", f"adds {unit}", ">NFN", ">modules", ">parameters", ">confidence"]
    grid = Grid(f"Choice by {sweep.parameter} ({unit}s)", headers)
    for row in sweep.steps:
        counts = [f"{row.num_modules}", f"{row.num_parameters:,}"]
        grid.rows.append([f"{row.value}", row.added, f"{row.nfn:.4f}", *counts, percent(row.confidence)])
    show(grid, console)
    if not sweep.by_samples:
        show_line("No samples.safetensors beside the scores: confidence and smaller samples are unknown.", console)
        return
    grid = Grid("Choice by number of samples", [">samples", "chosen", "final choice", ">P(final choice)"])
    for entry in sweep.by_samples:
        final = "yes" if entry.is_final_choice else "no"
        grid.rows.append([f"{entry.num_samples}", short_list(entry.units), final, percent(entry.agreement)])
    show(grid, console)


def print_diagnostics(diagnostics: Iterable[Diagnostic], console: Console | None = None) -> None:
    """Print findings, one per line, warnings in colour on a terminal."""
    console = console or VisibleConsole()
    for finding in diagnostics:
        style = "[yellow]warning:[/]" if finding.severity == "warning" else "[dim]note:[/]"
        if console.is_terminal:
            console.print(f"{style} {escape(finding.text)}", highlight=False)
        else:
            show_line(f"{finding.severity}: {finding.text}", console)


def print_training(run_dir: RunDir, console: Console | None = None) -> None:
    """Print what a training's summary.json says: steps, held-out loss before and after, adapter. Nothing if absent."""
    trained = read_trained(run_dir)
    if trained is None:
        return
    if not trained.is_of_placement:
        show_line(f"Not trained: {run_dir.train} holds the training of an earlier placement.", console)
        return
    summary = trained.summary
    parts = [f"Trained: {summary.get('method', 'adapter')}"]
    if summary.get("num_steps") is not None:
        parts.append(f"{summary['num_steps']} steps")
    before, after = summary.get("held_out_before"), summary.get("held_out_after")
    if before is not None and after is not None:
        parts.append(f"held-out loss {before:.4f} -> {after:.4f}")
    first, last = summary.get("reward_first"), summary.get("reward_last")
    if first is not None and last is not None:
        parts.append(f"reward {first:.4f} -> {last:.4f}")
    parts += [f"{name} {summary[name]}" for name in ("adapter", "note") if summary.get(name)]
    show_line(" · ".join(parts), console)


def interval_text(interval: tuple[float, float] | None) -> str:
    """Return an interval as `0.6310 to 0.6420`, or a dash."""
    return "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def percent(share: float | None) -> str:
    """Return a share as `99.4%`, or a dash."""
    return "-" if share is None else f"{share:.1%}"


def short_list(names: Sequence[str], most_characters: int = 160) -> str:
    """Return names separated by spaces, as many as fit a line or two, and the rest counted."""
    shown, length = 0, 0
    while shown < len(names) and (not shown or length + len(names[shown]) <= most_characters):
        length += len(names[shown]) + 1
        shown += 1
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return " ".join(names[:shown]) + more


def _chosen_cells(placement: Placement) -> dict[str, tuple[str, str]]:
    """Return of each type that has chosen modules how many these are, and what adapters on them cost."""
    members = placement.chosen
    position = {name: index for index, name in enumerate(placement.module_types)}
    type_M = np.array([position[module.type] for module in members])
    sizes = AdapterSizes(members, placement.rank_of, placement.source.left_out)
    counts, costs = np.bincount(type_M), sizes.totals(type_M, len(position))
    num_modules = {entry.type: entry.num_modules for entry in placement.source.types}
    return {
        name: ("yes" if count == num_modules[name] else f"{count}/{num_modules[name]}", f"{cost:,}")
        for name, count, cost in zip(position, counts.tolist(), costs.tolist(), strict=True)
    }


def _summary(placement: Placement) -> str:
    confidence = placement.selection_confidence
    sure = "" if confidence is None else f", the same in {confidence:.1%} of bootstrap resamples"
    return (
        f"Chosen: {' '.join(placement.module_types)} · {len(placement.modules)} modules, rank {placement.rank}, "
        f"{placement.num_trainable_parameters:,} trainable parameters{sure}."
    )
