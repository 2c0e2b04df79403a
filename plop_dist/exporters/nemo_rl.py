"""Placement -> NeMo-RL's overrides, for DTensor (Automodel's LoRA) and Megatron (Bridge's fused LoRA only).

Automodel matches targets against a module's whole path, `*` for any text and a dot for any character: `*.v_proj`.
"""

from __future__ import annotations

import re
from typing import Any

from plop_dist.exporters.megatron_targets import megatron_targets
from plop_dist.exporters.peft import count_note
from plop_dist.exporters.targets import (
    Targets,
    check_engine,
    hugging_face_targets,
    refuse_other_than_linears,
    shortest_names,
    uniform_rank,
    whole_number,
)
from plop_dist.exporters.text import hydra_overrides, nested, yaml_text
from plop_dist.values.placement import Export, Placement


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return the overrides and the same as YAML.

    engine: "dtensor" (default), "automodel" (the same under the name it has from NeMo-RL 0.8), or "megatron".
    Raises ExportError for ranks that differ; under megatron for a part of linear_qkv or linear_fc1.
    """
    engine = check_engine(engine, ("dtensor", "automodel", "megatron"), "nemo-rl")
    if engine == "megatron":
        return _export_megatron(placement, widen)
    targets = hugging_face_targets(placement, "nemo-rl", widen)
    refuse_other_than_linears(targets, placement, "nemo-rl's Automodel adapts")
    rank, alpha, widened = uniform_rank(targets, placement, "nemo-rl", widen)
    section = f"policy.{engine}_cfg.lora_cfg"
    fields: dict[str, Any] = {
        f"{section}.enabled": True,
        f"{section}.target_modules": _patterns(targets),
        f"{section}.exclude_modules": [],
        f"{section}.match_all_linear": False,
        f"{section}.dim": rank,
        f"{section}.alpha": whole_number(alpha, "nemo-rl"),
    }
    notes = [*targets.notes, *count_note(placement, targets)]
    if engine == "dtensor":
        notes.append("NeMo-RL 0.8 calls policy.dtensor_cfg policy.automodel_cfg: use --engine automodel there.")
    return Export(
        target="nemo-rl",
        files={f"nemo_rl_{engine}.yaml": yaml_text(nested(fields))},
        flags=hydra_overrides(fields),
        notes=tuple(notes),
        widened=(*targets.widened, *widened),
    )


def _export_megatron(placement: Placement, widen: bool) -> Export:
    targets = megatron_targets(placement, "nemo-rl's megatron engine", engine="lora", widen=widen)
    section = "policy.megatron_cfg.peft"
    fields: dict[str, Any] = {
        f"{section}.enabled": True,
        f"{section}.target_modules": list(targets.names),
        f"{section}.exclude_modules": [],
        f"{section}.dim": targets.rank,
        f"{section}.alpha": whole_number(targets.alpha, "nemo-rl"),
    }
    if targets.has_experts:
        fields[f"{section}.share_expert_adapters"] = False
    return Export(
        target="nemo-rl",
        files={"nemo_rl_megatron.yaml": yaml_text(nested(fields))},
        flags=hydra_overrides(fields),
        notes=targets.notes,
        widened=targets.widened,
    )


def _patterns(targets: Targets) -> list[str]:
    wanted = [holder.path for holder in targets.holders]
    others = [path for path in targets.known_paths if path not in set(wanted)]
    patterns = []
    for name in shortest_names(wanted, targets.known_paths):
        if name in wanted:
            patterns.append(name)
            continue
        covered = [path for path in wanted if path.endswith(f".{name}")]
        parts = covered[0].split(".")
        for length in range(name.count(".") + 1, len(parts)):
            pattern = f"*.{'.'.join(parts[-length:])}"
            regex = re.compile(pattern.replace("*", ".*"))
            # `*.up_proj` also hits gate_up_proj, since the dot stands for any character: name the parent too.
            if not any(regex.fullmatch(path) for path in others) and all(map(regex.fullmatch, covered)):
                patterns.append(pattern)
                break
        else:
            patterns += covered
    return patterns
