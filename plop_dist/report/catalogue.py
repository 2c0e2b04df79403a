"""What there is to choose from: export targets and backends, each with what it can and cannot express."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from plop_dist.errors import PlopError
from plop_dist.exporters.exporter import Exporter, find_exporter
from plop_dist.exporters.fits import Fit, fit
from plop_dist.registry import BACKENDS, load
from plop_dist.report.grid import show_line
from plop_dist.values.console import VisibleConsole
from plop_dist.values.placement import Placement

_LABEL_WIDTH = 10
_WORDS = {"exact": "exactly", "with --widen": "with --widen: ", "refused": "no: ", "failed": "failed: "}


def print_targets(names: Sequence[str], placement: Placement | None = None, console: Console | None = None) -> None:
    """Print these export targets, and with a placement what each can express of it.

    Raises ConfigError for a name that is not known.
    """
    for name in names:
        target = _found(find_exporter, name, names, console)
        if target is None:
            continue
        lines = [
            ("writes", [target.summary]),
            ("engines", [", ".join(target.engines)] if len(target.engines) > 1 else []),
            ("keys", [", ".join(target.keys)]),
            ("matches", [target.matching]),
            ("cannot", target.limits),
        ]
        if placement is not None:
            lines.insert(0, ("this one", _verdicts(target, placement)))
        _print_entry(name, lines, console)


def print_fits(found: Sequence[Fit], run_dir: Path, console: Console | None = None) -> None:
    """Print what each target makes of a placement, engines that say the same in one entry, and what to type next."""
    entries: dict[tuple[str, str], list[str]] = {}
    several = Counter(item.target for item in found)
    for item in found:
        text = _WORDS[item.verdict] + " ".join(item.reasons)
        entries.setdefault((item.target, text), []).append(item.engine)
    for (target, text), engines in entries.items():
        engine = f" --engine {'|'.join(engines)}" if several[target] > len(engines) else ""
        _print_entry(f"--to {target}{engine}", [("this one", [text])], console)
    exact = next((item.target for item in found if item.verdict == "exact"), None)
    if exact is not None:
        show_line(f"Next: plop-dist export {run_dir} --to {exact}", console)


def print_backends(names: Sequence[str], console: Console | None = None) -> None:
    """Print these backends. Raises ConfigError for a name that is not known."""
    for name in names:
        backend = _found(partial(load, BACKENDS), name, names, console)
        if backend is not None:
            lines = [
                ("is", [backend.summary]),
                ("keys", [", ".join(f"parallel.{key}" for key in backend.keys)]),
                ("layouts", backend.layouts),
                ("cannot", backend.limits),
                (
                    "in a job",
                    [f"plop_dist.score(model, batches), where model is {backend.hosts}"] if backend.hosts else [],
                ),
            ]
            _print_entry(name, lines, console)


def _found(find: Callable[[str], Any], name: str, names: Sequence[str], console: Console | None) -> Any:
    try:
        return find(name)
    except PlopError as error:
        if len(names) == 1:
            raise
        _print_entry(name, [("is", [f"not to be used: {error}"])], console)  # the others are still to be listed
        return None


def _verdicts(target: Exporter, placement: Placement) -> list[str]:
    """Return what the target can express of the placement: one line for all engines that say the same."""
    engines: dict[str, list[str]] = {}
    for engine in target.engines:
        engines.setdefault(_verdict(target, placement, engine), []).append(engine)
    if len(target.engines) == 1:
        return list(engines)
    return [f"{', '.join(names)}: {verdict}" for verdict, names in engines.items()]


def _verdict(target: Exporter, placement: Placement, engine: str) -> str:
    found = fit(target, engine, placement)
    return _WORDS[found.verdict] + " ".join(found.reasons)


def _print_entry(name: str, lines: Iterable[tuple[str, Sequence[str]]], console: Console | None) -> None:
    console = console or VisibleConsole()
    console.print(name, style="bold", markup=False, highlight=False)
    for label, items in lines:
        for number, item in enumerate(items):
            head = f"  {'' if number else label:<{_LABEL_WIDTH}}"
            width = console.width if console.is_terminal else len(head) + len(item) + 1
            folded = textwrap.wrap(item, width, initial_indent=head, subsequent_indent=" " * len(head))
            for line in folded:
                show_line(line, console)
    show_line("", console)
