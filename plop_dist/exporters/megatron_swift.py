"""Placement -> Megatron-SWIFT's flags: --target_modules with Megatron's fused names, --lora_rank, --lora_alpha.

Megatron-SWIFT hands the list to PEFT, which matches the end of a path of the Megatron model: `*` means nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.list_exporter import as_list
from plop_dist.exporters.megatron_read import read_megatron
from plop_dist.exporters.megatron_targets import megatron_targets
from plop_dist.exporters.refusals import RANKS, WHOLE_ALPHA, check_engine, whole_number
from plop_dist.exporters.text import shell_flags, yaml_text
from plop_dist.values.placement import Export, Placement


class MegatronSwift:
    """Megatron-SWIFT's flags."""

    name = "megatron-swift"
    summary = "Megatron-SWIFT's flags and --config file"
    engines = ("megatron",)
    keys = ("tuner_type", "lora_rank", "lora_alpha", "target_modules")
    matching = "as in PEFT, a path of the Megatron model that is equal to it or ends with a dot and it"
    limits = (
        RANKS,
        WHOLE_ALPHA,
        "a part of linear_qkv or linear_fc1 (--widen: the whole)",
        "single layers, and what only a pattern tells apart in Megatron",
        "types that Megatron has no name for: LM head, Mamba mixers",
    )
    flags_in: Language = "shell"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the flags and a --config file.

        Raises ExportError for ranks that differ, a part of linear_qkv or linear_fc1 (unless `widen`), and single
        layers.
        """
        check_engine(engine, self.engines, self.name)
        targets = megatron_targets(placement, self.name, engine="lora", widen=widen)
        fields = {
            "tuner_type": "lora",
            "lora_rank": targets.rank,
            "lora_alpha": whole_number(targets.alpha, self.name),
            "target_modules": [_suffix(name) for name in targets.names],
        }
        return Export(
            target=self.name,
            files={"megatron_swift.yaml": yaml_text(fields)},
            flags=shell_flags(fields),
            notes=(*targets.notes, "ms-swift 3 calls tuner_type train_type."),
            widened=targets.widened,
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what PEFT adapts in Megatron's model: paths that end with a name."""
        del where
        names = [f"*.{name}" if "." in name else name for name in as_list(fields["target_modules"])]
        return read_megatron(names, int(fields["lora_rank"]), placement, is_canonical=False)


EXPORTER = MegatronSwift()


def _suffix(name: str) -> str:
    suffix = name.removeprefix("*.")
    if "*" in suffix or suffix.startswith("layers."):
        raise ExportError(
            f"megatron-swift takes names that end a path, and {name} is a pattern. Nearest choice: whole types for all "
            "layers, routed experts left out or chosen together with the dense MLP; or export to megatron-bridge."
        )
    return suffix
