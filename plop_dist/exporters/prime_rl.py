"""Placement -> prime-rl's TOML: trainer.model.lora.{rank, alpha, dropout, target_modules} of its LoRAConfig.

A name that is a regular expression is searched for anywhere in a path; a plain one is any component of it, so that a
path's end is always written as an expression.
"""

from __future__ import annotations

import re

from plop_dist.exporters.holders import Targets
from plop_dist.exporters.refusals import LINEARS, PART, RANKS
from plop_dist.exporters.suffixes import shortest_names
from plop_dist.exporters.toml_exporter import TomlExporter


def _names(targets: Targets) -> list[str]:
    paths = [holder.path for holder in targets.holders]
    return [rf"(^|\.){re.escape(name)}\Z" for name in shortest_names(paths, targets.known_paths)]


def _matches(name: str, path: str) -> bool:
    if re.search(r"[.*+?^$\[\]{}|()\\]", name):
        return re.search(name, path) is not None
    return name in path.split(".")


EXPORTER = TomlExporter(
    name="prime-rl",
    summary="prime-rl's trainer.model.lora as TOML; its lines are the flags",
    section="trainer.model.lora",
    file="prime_rl.toml",
    rank="rank",
    alpha="alpha",
    dropout="dropout",
    names=_names,
    found=_matches,
    matching="a regular expression that is found in a path",
    limits=(RANKS, LINEARS, PART),
)
