"""Tables and lines of text that fit the terminal: words stay whole, and in a pipe each row is one line."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.style import Style

from plop_dist.values.console import VisibleConsole
from plop_dist.values.visible import visible

_GAP = "  "


@dataclass
class Grid:
    """Rows of text under headers; columns whose header starts with `>` are aligned to the right."""

    title: str
    headers: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    highlighted: set[int] = field(default_factory=set)


def show(grid: Grid, console: Console | None = None) -> None:
    """Print a table; on a terminal that it is too wide for, headers and cells of words fold between words."""
    console = console or VisibleConsole()
    is_right = [header.startswith(">") for header in grid.headers]
    headers = [header.lstrip(">") for header in grid.headers]
    rows = [[visible(cell, keep="") for cell in row] for row in grid.rows]
    widths = _widths(headers, rows, console.width if console.is_terminal else None)
    console.print(grid.title, style=Style(italic=True), markup=False, highlight=False, soft_wrap=True)
    _show_row(headers, widths, is_right, console, Style(bold=True), ends_low=True)
    for index, row in enumerate(rows):
        _show_row(row, widths, is_right, console, Style(color="green") if index in grid.highlighted else None)


def show_line(text: str, console: Console | None = None, *, is_whole: bool = False, indent: str = "  ") -> None:
    """Print one line of text: on a terminal folded between words, in a pipe whole.

    is_whole: never folded, as what is to be pasted; indent: of the lines after a fold.
    """
    console = console or VisibleConsole()
    lines = [text]
    if console.is_terminal and not is_whole:
        lines = _fold(text, console.width, indent)
    for line in lines:
        # rich itself would read [brackets] as markup, and break a path at the margin.
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _fold(text: str, width: int, indent: str = "") -> list[str]:
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text) or [text]


def _widths(headers: Sequence[str], rows: Sequence[Sequence[str]], most: int | None) -> list[int]:
    """Return each column's width: as wide as its widest text, or so narrow that a line of `most` fits."""
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max(_longest_word(header), *map(len, cells), 0) for header, *cells in columns]
    for index, (header, *cells) in enumerate(columns):
        if index and any(cell.count(" ") > 2 for cell in cells):  # words; not a name, nor a number with its unit
            least[index] = max(map(_longest_word, (header, *cells)))
    while most is not None and sum(widths) + len(_GAP) * (len(widths) - 1) > most:
        widest = max(range(len(widths)), key=lambda index: widths[index] - least[index])
        if widths[widest] <= least[widest]:
            break
        widths[widest] -= 1
    return widths


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _show_row(
    cells: Sequence[str],
    widths: Sequence[int],
    is_right: Sequence[bool],
    console: Console,
    style: Style | None,
    *,
    ends_low: bool = False,
) -> None:
    """Print one row, of several lines where cells fold; ends_low: short cells stand on its last line."""
    folded = [[cell] if len(cell) <= width else _fold(cell, width) for cell, width in zip(cells, widths, strict=True)]
    height = max(map(len, folded))
    for cell in folded:
        missing = [""] * (height - len(cell))
        cell[:] = missing + cell if ends_low else cell + missing
    for parts in zip(*folded, strict=True):
        line = _GAP.join(
            part.rjust(width) if right else part.ljust(width)
            for part, width, right in zip(parts, widths, is_right, strict=True)
        )
        console.print(line.rstrip(), style=style, markup=False, highlight=False, soft_wrap=True)
