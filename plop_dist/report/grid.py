"""A grid of text: a table where someone looks, plain aligned lines in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plop_dist.values.console import VisibleConsole
from plop_dist.values.visible import visible


@dataclass
class Grid:
    """Rows of text under headers; columns whose header starts with `>` are aligned to the right."""

    title: str
    headers: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    highlighted: set[int] = field(default_factory=set)


def show(grid: Grid, console: Console | None = None) -> None:
    """Print rows: a table on a terminal, aligned lines in a pipe."""
    console = console or VisibleConsole()
    is_right = [header.startswith(">") for header in grid.headers]
    headers = [header.lstrip(">") for header in grid.headers]
    rows = [[visible(cell, keep="") for cell in row] for row in grid.rows]
    if console.is_terminal:
        table = Table(title=escape(grid.title), title_justify="left", header_style="bold")
        for index, (header, right) in enumerate(zip(headers, is_right, strict=True)):
            # names stay whole on a narrow terminal, the other columns fold
            table.add_column(header, justify="right" if right else "left", overflow="fold", no_wrap=index == 0)
        for index, row in enumerate(rows):
            table.add_row(*map(escape, row), style="green" if index in grid.highlighted else None)
        console.print(table)
        return
    show_line(grid.title, console)
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    for row in [headers, *rows]:
        cells = zip(row, widths, is_right, strict=True)
        show_line(
            "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip(),
            console,
        )


def show_line(text: str, console: Console | None = None) -> None:
    """Print one line of text, unfolded."""
    # A pipe gets the line whole: rich would fold it at 80 columns and read [brackets] as markup.
    (console or VisibleConsole()).print(text, markup=False, highlight=False, soft_wrap=True)
