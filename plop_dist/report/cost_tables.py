"""What a run would cost and what was measured, as tables on the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence

from plop_dist.costs.bench import HEADLESS, SCORING, STRAIGHTFORWARD, WITH_LOGITS, Bench
from plop_dist.costs.plan import Plan
from plop_dist.costs.scale import Scale
from plop_dist.report.grid import Grid, show, show_line


def print_plan(plan: Plan) -> None:
    """Print the plan: a table on a terminal, aligned lines in a pipe."""
    show_line(f"Model: {plan.model} · {plan.architecture} · {plan.num_parameters:,} parameters · {plan.dtype}")
    show_line(f"Ranks: {plan.world_size} · {plan.layout}")
    data = plan.data
    known = [
        f"{data.num_samples} samples" if data.num_samples is not None else "on a hub, not looked at",
        f"{data.num_tokens:,} tokens" if data.num_tokens is not None else None,
        f"longest {data.longest}" if data.longest is not None else None,
    ]
    show_line(f"Data: {data.source} · {' · '.join(item for item in known if item)}")
    if data.first is not None:
        show_line(f"First sample: {data.first!r}")
    grid = Grid("Modules", ["type", ">modules", ">on one rank", ">LoRA parameters"])
    for entry in plan.types:
        counts = (entry.num_modules, entry.num_on_one_rank, entry.lora_parameters)
        grid.rows.append([entry.type, *(f"{count:,}" for count in counts)])
    show(grid)
    grid = Grid(
        f"One rank, per micro-batch of up to {plan.tokens_per_micro_batch:,} tokens",
        ["stage", "layers", ">ranks", ">modules", ">weights", ">activations", ">collectives", ">sent by scoring"],
    )
    with_gathers = any(stage.gathers.num_collectives for stage in plan.stages)
    if with_gathers:
        grid.headers = [*grid.headers, ">ZeRO-3 gathers", ">gathered"]
    for stage in plan.stages:
        row = [
            f"{stage.index}",
            f"{stage.layers.start}-{stage.layers.stop - 1}",
            f"{stage.num_ranks}",
            f"{len(stage.modules):,}",
            bytes_text(stage.weight_bytes),
            bytes_text(stage.activation_bytes),
            f"{stage.scoring.num_collectives}",
            bytes_text(stage.scoring.num_bytes),
        ]
        if with_gathers:
            row += [f"{stage.gathers.num_collectives}", bytes_text(stage.gathers.num_bytes)]
        grid.rows.append(row)
    show(grid)
    _print_verdict(plan)


def _print_verdict(plan: Plan) -> None:
    """Print what would be chosen, trained and run, and last of all whether the configuration is OK."""
    verdict = plan.verdict
    if verdict.choice is not None and verdict.parameters is not None:
        shares = [f"{count:,} ({count / plan.num_parameters:.2%})" for count in dict.fromkeys(verdict.parameters)]
        show_line(f"Placement: {verdict.choice} · {' to '.join(shares)} trainable parameters")
    if plan.training is not None:
        memory = plan.training
        show_line(
            f"Training: about {bytes_text(memory.total)} on the fullest rank: weights {bytes_text(memory.weights)}, "
            f"adapters with their optimizer {bytes_text(memory.adapters)}, activations of {memory.num_tokens:,} tokens "
            f"{bytes_text(memory.activations)}"
        )
    if verdict.exports:
        show_line(f"Export: {' · '.join(verdict.exports)}")
    show_line(f"run would do: {' · '.join(verdict.stages)}")
    for note in plan.notes:
        show_line(f"note: {note}")
    for warning in verdict.warnings:
        show_line(f"warning: {warning}")
    show_line(f"Verdict: {verdict.line}")


def print_bench(bench: Bench) -> None:
    """Print the measurements: a table on a terminal, aligned lines in a pipe."""
    show_line(
        f"{bench.model} · {bench.num_modules} modules · {bench.num_tokens:,} tokens in {bench.num_micro_batches} "
        f"micro-batches · {bench.device}, {bench.num_threads} threads · medians of {bench.repeats}"
    )
    grid = Grid(
        "Cost of one pass", ["variant", ">seconds", ">x forward", ">CPU seconds", ">x forward", ">peak", ">x forward"]
    )
    for variant, cost in bench.costs.items():
        time_ratio, cpu_ratio, peak_ratio = (
            f"{bench.ratio(variant, HEADLESS, what):.3f}" for what in ("seconds", "cpu_seconds", "peak_bytes")
        )
        seconds, cpu_seconds = f"{cost.seconds:.3f}", f"{cost.cpu_seconds:.3f}"
        peak = bytes_text(cost.peak_bytes)
        grid.rows.append([variant, seconds, time_ratio, cpu_seconds, cpu_ratio, peak, peak_ratio])
    show(grid)
    show_line(
        f"scoring / forward with logits {bench.ratio(SCORING, WITH_LOGITS):.3f} · straightforward / scoring "
        f"{bench.ratio(STRAIGHTFORWARD, SCORING):.2f}"
    )
    times = (
        "" if bench.baseline_ratio is None else f" · baselines / matmul of their directions {bench.baseline_ratio:.2f}"
    )
    show_line(f"baselines, once: {bench.baseline_seconds:.2f} s{times}")
    if not bench.scaling:
        return
    grid = Grid(
        f"Weak scaling, the same work per replica ({os.cpu_count()} cores)",
        [">ranks", "layout", ">tokens/s", ">efficiency", ">collectives per micro-batch", ">per 1000 tokens and layer",
         ">bytes per token and layer", ">collectives at the ends", ">bytes"],
    )  # fmt: skip
    for entry in bench.scaling:
        grid.rows.append(
            [
                f"{entry.num_ranks}",
                entry.layout,
                f"{entry.tokens_per_second:.0f}",
                f"{entry.efficiency_against(bench.scaling[0]):.2f}",
                f"{entry.collectives_per_micro_batch:g}",
                f"{1000 * entry.collectives_per_token_and_layer:.3f}",
                f"{entry.bytes_per_token_and_layer:.1f}",
                f"{entry.num_fixed_collectives}",
                bytes_text(entry.num_fixed_bytes),
            ]
        )
    show(grid)


def print_scale(scales: Sequence[Scale]) -> None:
    """Print what a module costs at each size, as ratios to the smallest, and the peak memory of the report."""
    first = scales[0]
    sizes = [f"{scale.num_sites:,}" for scale in scales]
    headers = [
        "step",
        *(f">s at {size}" for size in sizes),
        f">µs per module at {sizes[0]}",
        *(f">x at {size}" for size in sizes),
    ]
    grid = Grid("Time per hooked module, as ratios to the smallest model", headers)
    for step in first.seconds:
        seconds = [f"{scale.seconds[step]:.2f}" for scale in scales]
        ratios = [f"{scale.per_module(step) / first.per_module(step):.2f}" for scale in scales]
        grid.rows.append([step, *seconds, f"{1e6 * first.per_module(step):.0f}", *ratios])
    show(grid)
    modules = ", ".join(f"{scale.num_modules:,}" for scale in scales)
    peaks = ", ".join(bytes_text(scale.report_peak_bytes) for scale in scales)
    show_line(f"modules with a score: {modules} · peak memory of plop-dist report: {peaks}")


def bytes_text(number: int) -> str:
    """Return a number of bytes as people read it.

    >>> bytes_text(1536), bytes_text(0)
    ('1.5 KiB', '0 B')
    """
    amount, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"
