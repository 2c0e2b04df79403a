"""What an exporter is, and how one is found: this package's own, and those that other packages add by entry point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from plop_dist.errors import ConfigError
from plop_dist.registry import EXPORTERS, load, names
from plop_dist.values.placement import Export, Placement
from plop_dist.values.scores import Projection

Language = Literal["shell", "yaml", "toml", "python"]


@dataclass(frozen=True)
class Adapted:
    """What a file adapts in the scored model.

    ranks: by path; held: the projections that the target holds otherwise than the Hugging Face model does (fused),
    by path; rank: the common one.
    """

    ranks: Mapping[str, int]
    rank: int
    held: Mapping[str, Projection] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()

    def items(self, known: Iterable[Projection]) -> list[Projection]:
        """Return the adapted projections as the target holds them."""
        return [self.held.get(item.fqn, item) for item in known if item.fqn in self.ranks]


class Exporter(Protocol):
    """How one training framework writes down which modules get adapters. Importing it imports no framework.

    name: as `plop-dist export --to` takes it; summary: one line on what it writes, for people; engines: the values of
    --engine, the default first; keys: the target's own configuration keys that it sets; matching: one line on how the
    target matches a name with a module; limits: what it cannot express, one sentence each; flags_in: what Export.flags
    are written in, `shell` being words quoted for one.

    Where the target has a configuration object in Python, the exporter also has to_config(placement, **options). With
    read(fields, placement, where) -> Adapted it reads its own files back, whoever has written them, for `plop-dist
    diff`: fields are the file's settings by dotted key; errors of missing or odd values are told by the caller.
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
