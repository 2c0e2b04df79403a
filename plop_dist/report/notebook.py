"""Scores, placements and their chart where somebody looks at objects: a notebook, or a Python shell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path

from markupsafe import Markup

from plop_dist.choose.explain import explain
from plop_dist.report.figures import types_figure
from plop_dist.report.grid import Grid
from plop_dist.report.page import page_environment
from plop_dist.report.terminal import (
    CONFIDENCE_MEANS,
    NFN_MEANS,
    choice_summary,
    print_explanation,
    print_types,
    types_grid,
)
from plop_dist.values.console import VisibleConsole
from plop_dist.values.files import write_text
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores
from plop_dist.values.visible import visible

_FRAME = '<iframe srcdoc="{page}" style="width: 100%; height: {height}px; border: 0" sandbox title="{title}"></iframe>'


@dataclass(frozen=True)
class Shown:
    """Something to look at: as text in a shell, as HTML in a notebook."""

    text: str
    html: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | Path) -> Path:
        """Write the HTML, which needs no other file, and return the path. Raises RunDirError."""
        write_text(Path(path), self.html)
        return Path(path)


def scores_text(scores: Scores) -> str:
    """Return the table of types and what its numbers mean."""
    return _printed(lambda console: print_types(scores, None, console))


def scores_html(scores: Scores) -> str:
    """Return the same as HTML."""
    return _table(types_grid(scores), NFN_MEANS)


def placement_text(placement: Placement) -> str:
    """Return the table of types with what is chosen; without the scores beside it, the choice alone."""
    if not placement.has_source:
        return choice_summary(placement)
    return _printed(lambda console: print_types(placement.source, placement, console))


def placement_html(placement: Placement) -> str:
    """Return the same as HTML."""
    if not placement.has_source:
        return f"<p>{_escaped(choice_summary(placement))}</p>"
    return _table(types_grid(placement.source, placement), NFN_MEANS, choice_summary(placement), CONFIDENCE_MEANS)


def placement_explained(placement: Placement) -> Shown:
    """Return why each type is in or out, as `plop-dist place --explain` prints it."""
    explanation = explain(placement.source, placement)
    text = _printed(lambda console: print_explanation(explanation, console))
    return Shown(text, f"<pre>{_escaped(text)}</pre>")


def scores_plot(scores: Scores, placement: Placement | None = None) -> Shown:
    """Return the report's chart of NFN per type, with its 95% intervals; what a placement chose is marked."""
    environment = page_environment()
    style = environment.get_template("style.css.j2").render()
    source = '{% import "charts.html.j2" as draw %}<!doctype html><meta charset="utf-8"><style>{{ style }}</style>' + (
        "<main>{{ draw.bars(figure) }}</main>"
    )
    figure = types_figure(scores, placement)
    page = environment.from_string(source).render(style=Markup(style), figure=figure)
    title = _escaped(f"NFN per module type of {scores.model.name_or_path}")
    height = 26 * len(figure.bars) + 110
    return Shown(scores_text(scores), _FRAME.format(page=escape(page), height=height, title=title))


def _printed(show: Callable[[VisibleConsole], None]) -> str:
    sink = StringIO()
    show(VisibleConsole(file=sink, force_terminal=False))
    return sink.getvalue().rstrip("\n")


def _table(grid: Grid, *lines: str) -> str:
    def row(tag: str, cells: list[str], is_chosen: bool = False) -> str:
        weight = "; font-weight: bold" if is_chosen else ""
        styles = [f"text-align: {'right' if header.startswith('>') else 'left'}{weight}" for header in grid.headers]
        inner = "".join(
            f'<{tag} style="{style}">{_escaped(cell)}</{tag}>' for style, cell in zip(styles, cells, strict=True)
        )
        return f"<tr>{inner}</tr>"

    head = row("th", [header.lstrip(">") for header in grid.headers])
    body = "".join(row("td", [*cells], index in grid.highlighted) for index, cells in enumerate(grid.rows))
    notes = "".join(f"<p>{_escaped(line)}</p>" for line in lines)
    caption = f"<caption>{_escaped(grid.title)}</caption>"
    return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>{notes}"


def _escaped(text: str) -> str:
    return escape(visible(text, keep=""))
