"""Placement -> NeMo Automodel's `peft` section: target_modules, dim, alpha, as YAML and as overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from plop_dist.exporters.counts import count_note
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.holders import hugging_face_targets
from plop_dist.exporters.list_exporter import as_list
from plop_dist.exporters.names_read import found_by
from plop_dist.exporters.patterns import shortest_patterns
from plop_dist.exporters.refusals import (
    LINEARS,
    PART,
    RANKS,
    WHOLE_ALPHA,
    check_engine,
    one_rank,
    refuse_other_than_linears,
    whole_number,
)
from plop_dist.exporters.text import hydra_yaml, yaml_lines
from plop_dist.values.placement import Export, Placement


class Automodel:
    """NeMo Automodel's PeftConfig."""

    name = "automodel"
    summary = "NeMo Automodel's peft section as YAML; its lines are the flags"
    engines = ("automodel",)
    keys = tuple(
        f"peft.{key}" for key in ("_target_", "target_modules", "exclude_modules", "match_all_linear", "dim", "alpha")
    )
    matching = "a whole path, * for any text, a dot for any character"
    limits = (RANKS, WHOLE_ALPHA, LINEARS, PART)
    flags_in: Language = "yaml"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the section as YAML.

        Raises ExportError for ranks that differ, a part of a fused linear, and modules that are no nn.Linear.
        """
        check_engine(engine, self.engines, self.name)
        targets = hugging_face_targets(placement, self.name, widen)
        refuse_other_than_linears(targets, placement, "automodel adapts")
        rank, alpha, widened = one_rank(targets.ranks, placement, self.name, widen)
        tree = {
            "peft": {
                "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
                "target_modules": shortest_patterns([holder.path for holder in targets.holders], targets.known_paths),
                "exclude_modules": [],
                "match_all_linear": False,
                "dim": rank,
                "alpha": whole_number(alpha, self.name),
            }
        }
        text = hydra_yaml({f"peft.{key}": value for key, value in tree["peft"].items()})
        return Export(
            target=self.name,
            files={"automodel.yaml": text},
            flags=yaml_lines(tree),
            notes=(*targets.notes, *count_note(placement, targets)),
            widened=(*targets.widened, *widened),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what Automodel adapts: paths that a pattern matches whole."""
        del where
        patterns = as_list(fields["peft.target_modules"])
        regexes = {pattern: re.compile(pattern.replace("*", ".*"), re.DOTALL) for pattern in patterns}
        rank = int(fields["peft.dim"])
        return found_by(placement, rank, patterns, lambda name, item: bool(regexes[name].fullmatch(item.holder)))


EXPORTER = Automodel()
