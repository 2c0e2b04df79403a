"""How an engine with a TOML section of its own for LoRA is exported to: one mechanism; a target is the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from plop_dist.exporters.counts import count_note
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.holders import Targets, hugging_face_targets
from plop_dist.exporters.list_exporter import as_list
from plop_dist.exporters.names_read import found_by
from plop_dist.exporters.refusals import check_engine, one_rank, refuse_other_than_linears
from plop_dist.exporters.text import toml_lines, toml_text
from plop_dist.values.placement import Export, Placement


@dataclass(frozen=True, kw_only=True)
class TomlExporter:
    """The exporter of one such engine, which is called as its target is.

    section: the table; rank, alpha, dropout: its keys beside target_modules. names: what is written for the targets,
    where it may raise ExportError; found: whether a name written there adapts the module at a path.
    """

    name: str
    summary: str
    section: str
    file: str
    rank: str
    alpha: str
    dropout: str
    names: Callable[[Targets], list[str]]
    found: Callable[[str, str], bool]
    matching: str
    limits: tuple[str, ...]
    flags_in: Language = "toml"

    @property
    def engines(self) -> tuple[str, ...]:
        """The one engine."""
        return (self.name,)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that an export sets."""
        return tuple(f"{self.section}.{key}" for key in (self.rank, self.alpha, self.dropout, "target_modules"))

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the section as TOML. Raises ExportError for what `limits` says."""
        check_engine(engine, self.engines, self.name)
        targets = hugging_face_targets(placement, self.name, widen)
        refuse_other_than_linears(targets, placement, f"{self.name} adapts")
        rank, alpha, widened = one_rank(targets.ranks, placement, self.name, widen)
        fields = {
            self.rank: rank,
            self.alpha: float(alpha),
            self.dropout: 0.0,
            "target_modules": self.names(targets),
        }
        return Export(
            target=self.name,
            files={self.file: toml_text(self.section, fields)},
            flags=toml_lines(self.section, fields),
            notes=(*targets.notes, *count_note(placement, targets)),
            widened=(*targets.widened, *widened),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what the engine adapts: every linear whose path one of the names finds."""
        del where
        names = as_list(fields[f"{self.section}.target_modules"])
        rank = int(fields[f"{self.section}.{self.rank}"])
        return found_by(placement, rank, names, lambda name, item: self.found(name, item.holder))
