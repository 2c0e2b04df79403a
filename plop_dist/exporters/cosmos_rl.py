"""Placement -> cosmos-rl's TOML: policy.lora.{r, lora_alpha, lora_dropout, target_modules, r_pattern, alpha_pattern}.

It adapts every linear whose path contains one of target_modules; a pattern's key is a regular expression for a path's
end, and the first that matches counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.counts import count_note
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.holders import Targets, hugging_face_targets
from plop_dist.exporters.list_exporter import as_list
from plop_dist.exporters.names_read import found_by
from plop_dist.exporters.refusals import LINEARS, PART, RANKS, check_engine, one_rank, refuse_other_than_linears
from plop_dist.exporters.substrings import shortest_substrings
from plop_dist.exporters.text import toml_lines, toml_text
from plop_dist.values.placement import Export, Placement

_LORA = "policy.lora"


class CosmosRL:
    """cosmos-rl's LoraConfig."""

    name = "cosmos-rl"
    summary = "cosmos-rl's policy.lora as TOML; its lines are the flags"
    engines = ("cosmos-rl",)
    keys = tuple(f"{_LORA}.{key}" for key in ("r", "lora_alpha", "lora_dropout", "target_modules"))
    matching = "every path that contains it"
    limits = (LINEARS, PART, RANKS, "a module whose path another module's path contains")
    flags_in: Language = "toml"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the section as TOML.

        Raises ExportError for ranks that differ, a part of a fused linear, modules that are no nn.Linear, and those
        whose paths are contained in others.
        """
        check_engine(engine, self.engines, self.name)
        targets = hugging_face_targets(placement, self.name, widen)
        refuse_other_than_linears(targets, placement, "cosmos-rl adapts")
        rank, alpha, widened = one_rank(targets.ranks, placement, self.name, widen)
        fields = {"r": rank, "lora_alpha": float(alpha), "lora_dropout": 0.0, "target_modules": _names(targets)}
        return Export(
            target=self.name,
            files={"cosmos_rl.toml": toml_text(_LORA, fields)},
            flags=toml_lines(_LORA, fields),
            notes=(*targets.notes, *count_note(placement, targets)),
            widened=(*targets.widened, *widened),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what cosmos-rl adapts: paths that contain a name."""
        del where
        names = as_list(fields[f"{_LORA}.target_modules"])
        return found_by(placement, int(fields[f"{_LORA}.r"]), names, lambda name, item: name in item.holder)


EXPORTER = CosmosRL()


def _names(targets: Targets) -> list[str]:
    wanted = {holder.path for holder in targets.holders}
    names, contained = shortest_substrings(wanted, [path for path in targets.known_paths if path not in wanted])
    # Some names end with the dot that stands behind a path where DeepSpeed searches; here nothing stands there.
    if contained is None:
        contained = next((name for name in names if name.endswith(".")), None)
    if contained is not None:
        raise ExportError(
            f"cosmos-rl matches substrings, and {contained} is contained in another module's path. Nearest choice: "
            "choose both, or export to peft."
        )
    return names
