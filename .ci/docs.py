"""Builds the API reference from the docstrings (`make docs`) and refuses warnings and broken links in it.

.venv/bin/python .ci/docs.py OUTPUT_FOLDER
"""

from __future__ import annotations

import logging
import pkgutil
import sys
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pdoc
import pdoc.render
from jinja2 import pass_context
from jinja2.runtime import Context
from markupsafe import Markup
from pdoc import _pydantic as fields
from pdoc.doc_types import empty
from pdoc.render_helpers import link
from pydantic_core import PydanticUndefined

import plop_dist
from plop_dist.backends.megatron.bridge import import_bridge

PUBLIC = ("score", "place", "Scores", "Placement")  # what the first page shows, in this order


def build(output: Path) -> list[str]:
    """Write the pages and return pdoc's warnings."""
    specs = ["plop_dist"]
    try:
        import_bridge()  # with a stub for Transformer Engine where that is absent
    except ImportError as error:
        print(f"plop_dist.canonical_lora is left out: {error}", file=sys.stderr)
        specs.append("!plop_dist.canonical_lora")
    # pdoc documents what is in a module's dictionary, and of a package with __all__ only the submodules that are in it
    for name in PUBLIC:
        setattr(plop_dist, name, getattr(plop_dist, name))
    rooms = (module.name for module in pkgutil.iter_modules(plop_dist.__path__))
    plop_dist.__all__ = [*PUBLIC, *(room for room in rooms if f"!plop_dist.{room}" not in specs)]
    # plain Markdown: the other formats read `name_` and `.. ` as reStructuredText
    pdoc.render.configure(docformat="markdown", footer_text=f"plop-dist {plop_dist.__version__}")
    fields.default_value = _shown_value
    pdoc.render.env.filters["link"] = _link_to_public
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Cannot determine where")  # what a class has from torch's compiled ones
        pdoc.pdoc(*specs, output_directory=output)
    return [str(warning.message) for warning in caught if "pdoc" in warning.filename]


def _shown_value(
    parent: object, name: str, value: object, given: Callable[..., object] = fields.default_value
) -> object:
    # pdoc 16 prints a field without default as `= PydanticUndefined`, and links into the text of a logger
    default = given(parent, name, value)
    return empty if default is PydanticUndefined or isinstance(default, logging.Logger) else default


@pass_context
def _link_to_public(context: Context, spec: tuple[str, str], text: str | None = None) -> str:
    # pdoc 16 links base classes whose names begin with _, which it does not show
    is_private = any(part.startswith("_") for part in spec[1].split("."))
    return Markup.escape(text or ".".join(spec)) if is_private else link(context, spec, text)


class _Page(HTMLParser):
    """What a page links to, and what in it can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one tag adds."""
        fields = dict(attrs)
        self.links += [str(fields[name]) for name in ("href", "src") if name in fields]
        self.anchors |= {str(fields[name]) for name in ("id", "name") if name in fields}


def faults(folder: Path) -> list[str]:
    """Return what is wrong with the pages of a folder: links and anchors that lead nowhere."""
    pages = {path.resolve(): _Page(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        for url in page.links:
            if url.split(":")[0] in ("http", "https", "data", "mailto"):
                continue
            target, anchor = urldefrag(unquote(url))
            file = (path.parent / target).resolve() if target else path
            if not url:
                found.append(f"{name}: a link to nothing")
            elif not file.is_file():
                found.append(f"{name}: {url} does not exist")
            elif anchor and file in pages and anchor not in pages[file].anchors:
                found.append(f"{name}: {url} has no such anchor")
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    wrong = [f"warning: {text}" for text in build(folder)] + faults(folder)
    print(*wrong, f"{folder / 'plop_dist.html'}: {len(list(folder.rglob('*.html')))} pages", sep="\n")
    sys.exit(bool(wrong))
