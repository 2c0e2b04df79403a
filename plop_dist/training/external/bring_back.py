"""What comes back from an engine's job: train/adapter in PEFT's format, train/log.jsonl, and how the rewards went.

Only safetensors and JSON are read of what an engine has left.
"""

# R rank, I in_features, O out_features

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plop_dist.config.schema import Config
from plop_dist.errors import RunDirError
from plop_dist.training.adapters.placed import lora_config
from plop_dist.training.adapters.saved import WEIGHTS, write_config, write_weights
from plop_dist.training.external.handover import Brought, HandedOver
from plop_dist.values.files import make_folder, read_json, write_text
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Placement

_PREFIX = "base_model.model."


def bring_back(config: Config, placement: Placement, handed: HandedOver) -> dict[str, Any] | None:
    """Write RUN_DIR/train/adapter and log.jsonl from what the engine has left, and return what the summary adds.

    None where the engine has left no adapter. Raises RunDirError for an adapter of other modules than the placement's
    (unless the export was widened), or one that is not PEFT's.
    """
    directory = handed.directory(config)
    brought = handed.engine.brought_back(directory)
    if brought is None:
        return None
    train, widened = config.run_path / "train", read_json(
        directory / "export.json", what="export", remedy="run plop-dist run again"
    )["widened"]  # fmt: skip
    make_folder(train / "adapter", train)
    _write_adapter(train / "adapter", brought.adapter, placement, config, is_widened=bool(widened))
    write_text(train / "log.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in brought.log))
    return {"num_steps": _num_steps(brought), "adapter": str(train / "adapter"), **_rewards(brought)}


def _num_steps(brought: Brought) -> int:
    return brought.log[-1]["step"] if brought.log else 0


def _rewards(brought: Brought) -> dict[str, Any]:
    rewards = [entry["reward"] for entry in brought.log]
    return {"reward_first": rewards[0] if rewards else None, "reward_last": rewards[-1] if rewards else None}


def _write_adapter(directory: Path, found: Path, placement: Placement, config: Config, *, is_widened: bool) -> None:
    """Write PEFT's two files: the engine's tensors under PEFT's names, and a configuration that fits them."""
    remedy = "keep the engine's folder and tell its version, or train again"
    stored = read_json(found / "adapter_config.json", what="adapter configuration", remedy=remedy)
    tensors = _read_tensors(found)
    modules = sorted({name.rpartition(".lora_")[0].removeprefix(_PREFIX) for name in tensors}, key=natural_key)
    has_parameters = any(module.storage == "expert_parameter" for module in placement.chosen)
    if not is_widened and not has_parameters:
        _check_modules(set(modules), {module.holder for module in placement.chosen}, found)
    peft_config = lora_config(placement, config, widen=is_widened)
    if is_widened or has_parameters:
        peft_config.target_modules, peft_config.rank_pattern, peft_config.alpha_pattern = set(modules), {}, {}
        peft_config.target_parameters = None
    rank = _number(stored, "r", found)
    # Some engines write alpha = r and have B carry the rest: B is brought to the alpha of our configuration.
    wanted = peft_config.lora_alpha / peft_config.r
    scale = _number(stored, "lora_alpha", found) / rank / wanted
    scaled = {
        name: (tensor.float() * scale if scale != 1 and ".lora_B" in name else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    write_weights(directory, scaled)
    write_config(directory, peft_config, config.stored()["model"]["name_or_path"])


def _read_tensors(found: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = found / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunDirError(f"'{path}', which the engine has left, cannot be read: {error}; train again.") from error
    named = {}
    for name, tensor in tensors.items():
        name = name.replace(".default.weight", ".weight")
        named[name if name.startswith(_PREFIX) else _PREFIX + name] = tensor
    odd = next((name for name in named if ".lora_A." not in name and ".lora_B." not in name), None)
    if odd is not None or not named:
        raise RunDirError(f"'{path}', which the engine has left, holds {odd or 'nothing'}, expected LoRA's A and B.")
    return named


def _check_modules(adapted: set[str], wanted: set[str], found: Path) -> None:
    missing, foreign = wanted - adapted, adapted - wanted
    if missing or foreign:
        which = f"lacks {min(missing, key=natural_key)}" if missing else f"has {min(foreign, key=natural_key)} besides"
        raise RunDirError(
            f"'{found}', which the engine has left, {which}: it adapts {len(adapted)} modules, the placement "
            f"{len(wanted)}. The engine's names are not the checkpoint's, or it is of another placement; train again."
        )


def _number(stored: Mapping[str, Any], key: str, found: Path) -> float:
    value = stored.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise RunDirError(
            f"'{found}/adapter_config.json': {key} is {value!r}, expected a positive number; train again."
        )
    return float(value)
