"""rich's console for what this package prints with it: tables, bars and lines in which hidden characters are seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from plop_dist.values.visible import visible


class VisibleConsole(Console):
    """A console that writes no control character but its own: colours, and what moves a bar."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Return the segments of a renderable, the text in them visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def render_str(self, text: str, **options: Any) -> Any:
        """Return a string as rich's text, made visible before it is folded, so that widths are right."""
        return super().render_str(visible(text), **options)
