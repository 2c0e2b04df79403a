"""What an exporter is, and how one is found: this package's own, and those that other packages add by entry point."""

from __future__ import annotations

from typing import Literal, Protocol

from plop_dist.errors import ConfigError
from plop_dist.registry import EXPORTERS, load, names
from plop_dist.values.placement import Export, Placement

Language = Literal["shell", "yaml", "python"]


class Exporter(Protocol):
    """How one training framework writes down which modules get adapters. Importing it imports no framework.

    name: as `plop-dist export --to` takes it; summary: one line on what it writes, for people; engines: the values of
    --engine, the default first; keys: the target's own configuration keys that it sets; matching: one line on how the
    target matches a name with a module; limits: what it cannot express, one sentence each; flags_in: what Export.flags
    are written in, `shell` being words quoted for one.

    Where the target has a configuration object in Python, the exporter also has to_config(placement, **options).
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def summary(self) -> str: ...  # noqa: D102
    @property
    def engines(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def keys(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def matching(self) -> str: ...  # noqa: D102
    @property
    def limits(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def flags_in(self) -> Language: ...  # noqa: D102

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return files and flags that adapt exactly the placement; pure: nothing is written, no framework imported.

        engine: one of `engines`; None: the first. widen: take the nearest choice that the target can express, and say
        so in Export.widened. Raises ExportError, naming that choice, for what the target cannot express.
        """
        ...


_FIELDS = ("name", "summary", "engines", "keys", "matching", "limits", "flags_in", "export")


def find_exporter(name: str) -> Exporter:
    """Return the exporter of this name. Raises ConfigError for an unknown name and for what is no exporter."""
    exporter = load(EXPORTERS, name)
    missing = [field for field in _FIELDS if not hasattr(exporter, field)]
    if missing:
        raise ConfigError(
            f"export target '{name}' is a {type(exporter).__name__} without {', '.join(missing)}; what its author must "
            "give it is in plop_dist/exporters/README.md."
        )
    return exporter


def every_exporter() -> tuple[Exporter, ...]:
    """Return all exporters, this package's own first: the rows of `plop-dist targets`. Raises as find_exporter does."""
    return tuple(find_exporter(name) for name in names(EXPORTERS))
