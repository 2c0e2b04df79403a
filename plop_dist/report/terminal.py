"""Scores, explanations and sweeps on the terminal, each with the words that say how to read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console

from plop_dist.choose.beside import Beside
from plop_dist.choose.diagnostics import Diagnostic
from plop_dist.choose.explain import Explanation
from plop_dist.choose.sweep import Sweep
from plop_dist.report.grid import Grid, show, show_line
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.trained import read_trained
from plop_dist.values.adapter_size import AdapterSizes
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores

NFN_MEANS = (
    "NFN: how strongly a layer answers its inputs; 1.0 is its answer to random inputs of the same norm. Below 1 the "
    "weights answer this data less than chance, and adapters go where it is lowest."
)
CONFIDENCE_MEANS = (
    "Confidence is the share of bootstrap resamples (the same samples, drawn anew) that lead to the same choice."
)
BESIDE_MEANS = (
    "parameters: as many multiply-adds more per token. kept bytes: float32 activations that training keeps of a token "
    "for the adapters' gradients."
)
PROBABILITY_MEANS = "P(chosen): the share of these resamples in which the type, or exactly this choice, is chosen."


def print_types(scores: Scores, placement: Placement | None = None, console: Console | None = None) -> None:
    """Print the types, lowest NFN first: NFN, interval, modules and, with a placement, what is chosen at which cost."""
    show(types_grid(scores, placement), console)
    show_line(NFN_MEANS, console)
    if placement is not None:
        show_line(choice_summary(placement), console)


def types_grid(scores: Scores, placement: Placement | None = None) -> Grid:
    """Return the table of types, lowest NFN first."""
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
    return grid


def print_explanation(explanation: Explanation, console: Console | None = None) -> None:
    """Print why each type is in or out, the next-best choice, and the alternatives at matched rank."""
    grid = Grid(f"Why · {explanation.rule}", ["type", ">NFN", "in", ">P(chosen)", ">parameters"])
    for verdict in explanation.verdicts:
        share = "yes" if verdict.num_chosen == verdict.num_modules else f"{verdict.num_chosen}/{verdict.num_modules}"
        if verdict.num_chosen:
            grid.highlighted.add(len(grid.rows))
        cells = [verdict.type, f"{verdict.nfn:.4f}", share if verdict.num_chosen else "no"]
        grid.rows.append([*cells, percent(verdict.probability), f"{verdict.num_parameters:,}"])
    show(grid, console)
    for verdict in explanation.verdicts:
        show_line(f"{verdict.type}: {verdict.reason}", console)
    show_line(f"Confidence: {percent(explanation.confidence)}. {CONFIDENCE_MEANS}", console)
    show_line(PROBABILITY_MEANS, console)
    if explanation.next_best:
        show_line(f"Next best: {explanation.next_best}.", console)
    grid = Grid(
        "Alternatives at the same rank", ["choice", "types", ">modules", ">parameters", ">mean NFN", ">P(chosen)"]
    )
    for other in explanation.alternatives:
        types, nfn = short_list(other.module_types), f"{other.nfn:.4f}"
        counts = [f"{other.num_modules}", f"{other.num_parameters:,}"]
        grid.rows.append([other.name, types, *counts, nfn, percent(other.probability)])
    show(grid, console)


def print_beside(rows: Sequence[Beside], console: Console | None = None) -> None:
    """Print what training the choice costs beside adapters on the MLP and on everything."""
    headers = ["choice", ">modules", ">rank", ">parameters", ">kept bytes/token"]
    grid = Grid("What it costs beside other choices", headers)
    for row in rows:
        kept = "-" if row.kept_bytes is None else f"{row.kept_bytes:,}"
        grid.rows.append([row.name, f"{row.num_modules:,}", f"{row.rank}", f"{row.num_parameters:,}", kept])
    show(grid, console)
    show_line(BESIDE_MEANS, console)


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
    show_line(CONFIDENCE_MEANS, console)
    show_line(
        "P(final choice): the share of resamples of so few samples that come to the choice of all samples.", console
    )


def print_diagnostics(diagnostics: Iterable[Diagnostic], console: Console | None = None) -> None:
    """Print findings, each once, warnings first."""
    for finding in dict.fromkeys(diagnostics):
        show_line(f"{finding.severity}: {finding.text}", console)


def print_training(run_dir: RunDir, console: Console | None = None) -> None:
    """Print what a training's summary.json says: steps, held-out loss before and after, adapter. Nothing if absent."""
    trained = read_trained(run_dir)
    if trained is None:
        return
    if not trained.is_of_placement:
        return  # said where what is outdated is named
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
    parts += [summary["note"]] if summary.get("note") else []
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


def choice_summary(placement: Placement) -> str:
    """Return in one line what is chosen, how much it trains, and how sure the choice is."""
    confidence = placement.selection_confidence
    sure = "" if confidence is None else f", the same in {confidence:.1%} of bootstrap resamples"
    return (
        f"Chosen: {short_list(placement.module_types)} · {len(placement.modules)} modules, rank {placement.rank}, "
        f"{placement.num_trainable_parameters:,} trainable parameters{sure}."
    )
