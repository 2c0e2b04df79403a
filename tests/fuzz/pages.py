"""What a browser would make of a page: its elements and text, and where in it something would act."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

_LEAD_ELSEWHERE = ("href", "src", "srcdoc", "action", "formaction", "data", "xlink:href", "style")


class Page(HTMLParser):
    """counts: how often each element is there; text: what stands outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.text = ""
        self._attributes: list[tuple[str, str, str]] = []
        self._inside = ""
        self.feed(text)

    @property
    def tags(self) -> set[str]:
        """The names of its elements."""
        return set(self.counts)

    def acting(self, token: str) -> list[str]:
        """Return attributes that act, or that lead elsewhere and hold the token."""
        return [
            f"<{tag} {name}={value[:80]!r}>"
            for tag, name, value in self._attributes
            if name.startswith("on") or (name in _LEAD_ELSEWHERE and token in value)
        ]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self._inside = tag
        self._attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data
