"""Placement -> Megatron-SWIFT's flags: --target_modules with Megatron's fused names, --lora_rank, --lora_alpha.

Megatron-SWIFT hands the list to PEFT, which matches the end of a path of the Megatron model: `*` means nothing there.
"""

from __future__ import annotations

from plop_dist.errors import ExportError
from plop_dist.exporters.megatron_targets import megatron_targets
from plop_dist.exporters.targets import check_engine, whole_number
from plop_dist.exporters.text import shell_flags, yaml_text
from plop_dist.values.placement import Export, Placement


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return the flags and a --config file.

    Raises ExportError for ranks that differ, a part of linear_qkv or linear_fc1 (unless `widen`), and single layers.
    """
    check_engine(engine, ("megatron",), "megatron-swift")
    targets = megatron_targets(placement, "megatron-swift", engine="lora", widen=widen)
    fields = {
        "tuner_type": "lora",
        "lora_rank": targets.rank,
        "lora_alpha": whole_number(targets.alpha, "megatron-swift"),
        "target_modules": [_suffix(name) for name in targets.names],
    }
    return Export(
        target="megatron-swift",
        files={"megatron_swift.yaml": yaml_text(fields)},
        flags=shell_flags(fields),
        notes=(*targets.notes, "ms-swift 3 calls tuner_type train_type."),
        widened=targets.widened,
    )


def _suffix(name: str) -> str:
    suffix = name.removeprefix("*.")
    if "*" in suffix or suffix.startswith("layers."):
        raise ExportError(
            f"megatron-swift takes names that end a path, and {name} is a pattern. Nearest choice: whole types for all "
            "layers, routed experts left out or chosen together with the dense MLP; or export to megatron-bridge."
        )
    return suffix
