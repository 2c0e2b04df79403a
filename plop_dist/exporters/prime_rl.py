"""Placement -> prime-rl's TOML: trainer.model.lora.{rank, alpha, dropout, target_modules}.

A name that is a regular expression is searched for anywhere in a path; a plain one is any component of it, so that a
path's end is always written as an expression.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from plop_dist.exporters.counts import count_note
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.holders import hugging_face_targets
from plop_dist.exporters.list_exporter import as_list
from plop_dist.exporters.names_read import found_by
from plop_dist.exporters.refusals import LINEARS, PART, RANKS, check_engine, one_rank, refuse_other_than_linears
from plop_dist.exporters.suffixes import shortest_names
from plop_dist.exporters.text import toml_lines, toml_text
from plop_dist.values.placement import Export, Placement

_LORA = "trainer.model.lora"


class PrimeRL:
    """prime-rl's LoRAConfig."""

    name = "prime-rl"
    summary = "prime-rl's trainer.model.lora as TOML; its lines are the flags"
    engines = ("prime-rl",)
    keys = tuple(f"{_LORA}.{key}" for key in ("rank", "alpha", "dropout", "target_modules"))
    matching = "a regular expression that is found in a path"
    limits = (RANKS, LINEARS, PART)
    flags_in: Language = "toml"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the section as TOML.

        Raises ExportError for ranks that differ, a part of a fused linear, and modules that are no nn.Linear.
        """
        check_engine(engine, self.engines, self.name)
        targets = hugging_face_targets(placement, self.name, widen)
        refuse_other_than_linears(targets, placement, "prime-rl adapts")
        rank, alpha, widened = one_rank(targets.ranks, placement, self.name, widen)
        paths = [holder.path for holder in targets.holders]
        fields = {
            "rank": rank,
            "alpha": float(alpha),
            "dropout": 0.0,
            "target_modules": [rf"(^|\.){re.escape(name)}\Z" for name in shortest_names(paths, targets.known_paths)],
        }
        return Export(
            target=self.name,
            files={"prime_rl.toml": toml_text(_LORA, fields)},
            flags=toml_lines(_LORA, fields),
            notes=(*targets.notes, *count_note(placement, targets)),
            widened=(*targets.widened, *widened),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what prime-rl adapts: paths in which an expression, or as a component a plain name, is found."""
        del where
        names = as_list(fields[f"{_LORA}.target_modules"])
        return found_by(placement, int(fields[f"{_LORA}.rank"]), names, lambda name, item: _matches(name, item.holder))


EXPORTER = PrimeRL()


def _matches(name: str, path: str) -> bool:
    if re.search(r"[.*+?^$\[\]{}|()\\]", name):
        return re.search(name, path) is not None
    return name in path.split(".")
