"""Placement -> cosmos-rl's TOML: policy.lora.{r, lora_alpha, lora_dropout, target_modules} of its LoraConfig.

It adapts every linear whose path contains one of target_modules.
"""

from __future__ import annotations

from plop_dist.errors import ExportError
from plop_dist.exporters.holders import Targets
from plop_dist.exporters.refusals import LINEARS, PART, RANKS
from plop_dist.exporters.substrings import shortest_substrings
from plop_dist.exporters.toml_exporter import TomlExporter


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


def _is_in(name: str, path: str) -> bool:
    return name in path


EXPORTER = TomlExporter(
    name="cosmos-rl",
    summary="cosmos-rl's policy.lora as TOML; its lines are the flags",
    section="policy.lora",
    file="cosmos_rl.toml",
    rank="r",
    alpha="lora_alpha",
    dropout="lora_dropout",
    names=_names,
    found=_is_in,
    matching="every path that contains it",
    limits=(LINEARS, PART, RANKS, "a module whose path another module's path contains"),
)
