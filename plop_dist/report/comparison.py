"""What a comparison has come to, on the terminal: a table of arms and differences, and the verdict in one sentence."""

from __future__ import annotations

from rich.console import Console

from plop_dist.compare.result import Comparison, ComparisonOf
from plop_dist.report.grid import Grid, show, show_line


def print_comparison(found: Comparison, console: Console | None = None) -> None:
    """Print every arm with its loss or reward, the first one gains over it, and the verdict."""
    grid = Grid(
        f"{found.measure} at {found.budget:,} parameters",
        ["arm", ">rank", ">rate", f">{found.unit}", ">gain of first", "verdict"],
    )
    against = {one.against: one for one in found.comparisons}
    for arm in found.arms:
        one = against.get(arm.arm)
        rate = f"{arm.learning_rate:.2g}{'' if arm.bracketed else '*'}"
        value = "diverged" if arm.value is None else f"{arm.value:.4f}"
        grid.rows.append(
            [arm.arm, f"{arm.rank}", rate, value, gain_text(one), "" if one is None else short(one.verdict)]
        )
    grid.highlighted.add(0)
    show(grid, console)
    if not all(arm.bracketed for arm in found.arms):
        show_line("* not bracketed: a rate further out may be better.", console)
    show_line(summary(found), console)


def summary(found: Comparison) -> str:
    """Return the verdict in one sentence."""
    first = found.arms[0].arm
    groups: dict[str, list[str]] = {}
    for one in found.comparisons:
        head = one.verdict.split()[0].rstrip(",")
        groups.setdefault(head, []).append(one.against)
    words = {
        "better": "is better than",
        "worse": "is worse than",
        "no": "makes no difference that matters to",
        "undecided": "cannot be told from",
    }
    parts = [f"{words[head]} {_listed(groups[head])}" for head in words if head in groups]
    return f"{first} {'; it '.join(parts)} ({found.rows.reported} rows, base {found.base:.4f})."


def gain_text(one: ComparisonOf | None) -> str:
    """Return a difference with half of its 95% interval."""
    if one is None or one.difference is None or one.ci95 is None:
        return ""
    return f"{one.difference:+.4f} ± {(one.ci95[1] - one.ci95[0]) / 2:.4f}"


def short(verdict: str) -> str:
    """Return a verdict as it fits into a table."""
    return verdict.replace("no difference larger than ", "none > ").replace("undecided, needs ", "undecided: ")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
