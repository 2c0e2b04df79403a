"""What the placement asks of the adapters: PEFT's configuration, ranks, scaling, and that none is missing."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist

from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError, PlacementError
from plop_dist.exporters.task_type import heads_trained_whole
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Placement


def lora_config(placement: Placement, config: Config, *, widen: bool = False) -> Any:
    """Return the peft.LoraConfig that stands for the placement in training. Raises ExportError."""
    return placement.to_peft(lora_dropout=config.train.lora_dropout, widen=widen)


def scaling_of(placement: Placement) -> float:
    """Return alpha / rank, which every module keeps whatever its own rank is."""
    return placement.alpha / placement.rank


def sizes_of(placement: Placement, peft_config: Any) -> dict[str, tuple[int, float]]:
    """Return the rank and the scaling that PEFT's configuration gives every chosen module, by path."""
    from peft.utils.other import get_pattern_key

    sizes = {}
    for fqn in placement.modules:
        rank = peft_config.rank_pattern.get(get_pattern_key(peft_config.rank_pattern, fqn), peft_config.r)
        alpha = peft_config.alpha_pattern.get(get_pattern_key(peft_config.alpha_pattern, fqn), peft_config.lora_alpha)
        sizes[fqn] = rank, alpha / (rank**0.5 if peft_config.use_rslora else rank)
    return sizes


_SIZES = {
    "target_modules", "target_parameters", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "lora_dropout",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "auto_mapping", "peft_version", "revision",
    "fan_in_fan_out",
}  # fmt: skip


def check_options(peft_config: Any, layout: str) -> None:
    """Raise LayoutError for an option of LoraConfig that adapters whose parts lie on several ranks do not have.

    So for a task in which a head is trained, too.
    """
    if heads := heads_trained_whole(peft_config.task_type):
        raise LayoutError(
            f"task_type is {peft_config.task_type}, in which PEFT trains the model's head ({' or '.join(heads)}) "
            f"beside the adapters; under {layout} adapters are trained alone: pass task_type=None to leave the head "
            "frozen, or train in one process, replicas, ZeRO or fully_shard."
        )
    plain = type(peft_config)()
    for name in sorted({field.name for field in dataclasses.fields(peft_config)} - _SIZES - _WITHOUT_EFFECT):
        value = getattr(peft_config, name)
        if value != getattr(plain, name):
            raise LayoutError(
                f"{name} is {value!r}, which adapters under {layout} do not have: they take r, lora_alpha, "
                "lora_dropout and use_rslora; leave it out, or train in a layout that holds weights whole."
            )


def check_draws(peft_config: Any, tp_group: Any) -> None:
    """Raise LayoutError where tensor-parallel ranks would drop out differently. Collective over tp_group.

    Each reads the same hidden states: whole parts of an adapter would drift apart.
    """
    if not peft_config.lora_dropout:
        return
    state = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()
    own = hashlib.sha256(state.numpy().tobytes()).hexdigest()
    every: list[Any] = [None] * dist.get_world_size(tp_group)
    dist.all_gather_object(every, own, group=tp_group)
    if len({*every}) > 1:
        raise LayoutError(
            f"lora_dropout is {peft_config.lora_dropout}, but the tensor-parallel ranks' random states differ, so that "
            "each would drop other values of the same hidden states; call torch.manual_seed with one seed on all of "
            "them, or leave lora_dropout out."
        )


def check_complete(adapted: Collection[str], placement: Placement) -> None:
    """Raise PlacementError unless exactly the chosen modules have an adapter."""
    missing = sorted(set(placement.modules) - set(adapted), key=natural_key)
    foreign = sorted(set(adapted) - set(placement.modules), key=natural_key)
    if missing or foreign:
        what = f"'{missing[0]}' got no adapter" if missing else f"'{foreign[0]}' got one without being chosen"
        raise PlacementError(
            f"The placement has {len(placement.modules)} modules, but {len(adapted)} got an adapter: {what}; "
            "score and place this model again."
        )
