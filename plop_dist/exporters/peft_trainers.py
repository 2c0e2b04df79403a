"""Placement -> the trainers that hand a list of names to PEFT: TRL, OpenRLHF, ms-swift, LLaMA-Factory, Axolotl."""

from __future__ import annotations

import re
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.holders import Targets
from plop_dist.exporters.list_exporter import ListExporter, as_list
from plop_dist.exporters.text import dot_list, shell_flags, shell_text, yaml_lines, yaml_text


def _trl_names(targets: Targets) -> list[str]:
    if any(part.type == "lm_head" for holder in targets.holders for part in holder.projections):
        raise ExportError(
            "trl refuses an adapter on the head (lm_head): it multiplies by the head's weight itself. Nearest choice: "
            "choose without it (placement.exclude=[lm_head]), or export to peft.",
            ["lm_head"],
        )
    # TRL turns a list of one name into a string, which PEFT reads as a regex on the whole path.
    if len(targets.modules) != 1:
        return list(targets.modules)
    name = targets.modules[0]
    if targets.has_experts and "." in name:
        # Beside 3-D experts PEFT cuts a regex down to its last component, so one path would become all of them.
        raise ExportError(
            f"trl would adapt every {name.rpartition('.')[2]} of this MoE model, not only {name}: it turns one name "
            "into a regex, of which PEFT keeps the last component. Nearest choice: all of this type "
            "(placement.granularity=type), or export to peft."
        )
    is_path = any(holder.path == name for holder in targets.holders)
    return [re.escape(name) if is_path else rf".*\.{re.escape(name)}"]


def _one_name_is_a_regex(value: Any) -> Any:
    found = as_list(value)
    return found[0] if len(found) == 1 else found


def _comma_list(targets: Targets) -> str:
    frozen = next((part for holder in targets.holders for part in holder.projections if part.part != "language"), None)
    if frozen is not None:
        raise ExportError(
            f"llamafactory freezes what is no language model (freeze_vision_tower, freeze_multi_modal_projector) and "
            f"adapts nothing there, e.g. {frozen.fqn}. Nearest choice: the language model alone (placement.include), "
            "or export to peft.",
            [frozen.type],
        )
    for name in targets.modules:
        if "," in name or name != name.strip() or "${" in name:
            raise ExportError(
                f"llamafactory reads lora_target as names between commas, in which {name!r} is not one name. Nearest "
                "choice: choose without it (placement.exclude), or export to peft."
            )
    return ",".join(targets.modules)


TRL = ListExporter(
    name="trl",
    summary="TRL's command line and --config file (ModelConfig)",
    first={"use_peft": True},
    rank="lora_r",
    alpha="lora_alpha",
    modules="lora_target_modules",
    parameters="lora_target_parameters",
    beside_parameters={"lora_dropout": 0.0},  # TRL's default is 0.05, which PEFT refuses on parameters
    # Without target_modules PEFT would add its defaults for the model; a regex that nothing matches adds none.
    without_modules={"lora_target_modules": ["(?!)"]},
    names=_trl_names,
    read_names=_one_name_is_a_regex,
    matching="as in PEFT; one name alone is a regex on the whole path",
    further_limits=("one single module of an MoE model with 3-D experts", "the head, which it multiplies by itself"),
    file="trl.yaml",
    text=yaml_text,
    flags=shell_flags,
)

OPENRLHF = ListExporter(
    name="openrlhf",
    summary="OpenRLHF's flags, and a file of arguments to append to its command",
    rank="ds.lora.rank",
    alpha="ds.lora.alpha",
    modules="ds.lora.target_modules",
    file="openrlhf.args",
    text=shell_text,
    flags=shell_flags,
)

MS_SWIFT = ListExporter(
    name="ms-swift",
    summary="ms-swift's flags and --config file",
    first={"tuner_type": "lora"},
    rank="lora_rank",
    alpha="lora_alpha",
    modules="target_modules",
    parameters="target_parameters",
    beside_parameters={"lora_dropout": 0.0},  # its default is 0.05, which PEFT refuses on parameters
    # An empty list cannot be typed, and without one ms-swift adapts all linears: a regex that nothing matches.
    without_modules={"target_regex": "(?!)"},
    read_names=lambda value: value if value == "(?!)" else as_list(value),
    notes=("ms-swift 3 calls tuner_type train_type.",),
    file="ms_swift.yaml",
    text=yaml_text,
    flags=shell_flags,
)

LLAMAFACTORY = ListExporter(
    name="llamafactory",
    summary="LLaMA-Factory's YAML, and the overrides of `llamafactory-cli train`",
    first={"finetuning_type": "lora"},
    rank="lora_rank",
    alpha="lora_alpha",
    modules="lora_target",
    names=_comma_list,
    read_names=lambda text: text.split(","),
    further_limits=("a name with a comma, or with a space at its end", "towers and projectors, which it freezes"),
    file="llamafactory.yaml",
    text=yaml_text,
    flags=dot_list,
)

AXOLOTL = ListExporter(
    name="axolotl",
    summary="Axolotl's YAML; its lines are the flags",
    first={"adapter": "lora"},
    rank="lora_r",
    alpha="lora_alpha",
    then={"lora_dropout": 0.0},
    modules="lora_target_modules",
    parameters="lora_target_parameters",
    patterns=("lora_rank_pattern", "lora_alpha_pattern"),
    file="axolotl.yaml",
    text=yaml_text,
    flags=yaml_lines,
    flags_in="yaml",
)
