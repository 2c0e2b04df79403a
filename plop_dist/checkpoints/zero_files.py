"""How ZeRO's files of one model-parallel rank cut its parameters up, and where each one's pieces lie.

Weights that ZeRO trains come in float32 from the optimizer's master copies; frozen ones, and all without ZeRO, as the
module held them (there the masters have no names).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plop_dist.checkpoints.safe_pickle import load_mapped
from plop_dist.checkpoints.unread import UnreadTensor, unread_pieces
from plop_dist.errors import ModelError

Weights = dict[str, UnreadTensor]


def load_model_states(folder: Path, mp_rank: int) -> list[Any]:
    """Return the module's states: one, or at ZeRO 3 those of all data-parallel ranks in order."""
    ranks = sorted(numbers(folder, rf"zero_pp_rank_(\d+)_mp_rank_{mp_rank:02d}_model_states\.pt"))
    if not ranks:
        return [load_mapped(folder / f"mp_rank_{mp_rank:02d}_model_states.pt")]
    states = [load_mapped(folder / f"zero_pp_rank_{rank}_mp_rank_{mp_rank:02d}_model_states.pt") for rank in ranks]
    _check_ranks(folder, ranks, states[0]["dp_world_size"], "model_states")
    return states


def find_partitioned(folder: Path, mp_rank: int, states: list[Any], has_masters: bool) -> Weights:
    """Return the weights that one model-parallel rank's files hold: of the whole model, or of a pipeline's stage."""
    if not numbers(folder, rf"zero_pp_rank_(\d+)_mp_rank_{mp_rank:02d}_model_states\.pt"):
        state = states[0]
        weights = {name: whole(tensor) for name, tensor in (state["module"] or {}).items()}
        # Without ZeRO the masters have no names; the module then holds what the job computed with.
        if has_masters and state.get("param_shapes"):
            weights |= _from_flat_groups(state["param_shapes"], _optimizers(folder, mp_rank))
        return weights
    buffers = set(states[0]["buffer_names"])
    weights = {name: whole(tensor) for name, tensor in states[0]["module"].items() if name in buffers}
    for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
        weights[name] = pieced(name, shape, [state["frozen_param_fragments"][name] for state in states])
    if has_masters:
        weights |= _from_partitions(states[0]["param_shapes"], _optimizers(folder, mp_rank))
    return weights


def whole(tensor: Tensor) -> UnreadTensor:
    """Return a stand-in for a tensor that lies in one piece."""
    return unread_pieces(tensor.shape, [tensor.reshape(-1)])


def pieced(name: str, shape: Iterable[int], pieces: list[Tensor]) -> UnreadTensor:
    """Return a stand-in for a tensor cut into pieces, in order, with padding at the end. Raises ModelError."""
    shape = torch.Size(shape)
    flat = [piece.reshape(-1) for piece in pieces]
    found = sum(piece.numel() for piece in flat)
    if found < shape.numel():
        raise ModelError(
            f"model.checkpoint holds {found} of the {shape.numel()} elements of '{name}' {tuple(shape)}; files of "
            "another job lie among its own, or one was cut off: copy it again."
        )
    return unread_pieces(shape, flat)


def numbers(folder: Path, pattern: str) -> set[int]:
    """Return the numbers that the pattern's group finds in the names of the folder's files."""
    return {int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))}


def _from_flat_groups(groups: Any, optimizers: list[Any]) -> Weights:
    """ZeRO 1 and 2: a group's parameters lie one after the other, and the ranks hold equal stretches of that line."""
    weights: Weights = {}
    paddings = optimizers[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        line = [optimizer["single_partition_of_fp32_groups"][number] for optimizer in optimizers]
        start = 0
        for index, (name, shape) in enumerate(shapes.items()):
            numel = torch.Size(shape).numel()
            weights[name] = pieced(name, shape, _stretch(line, start, numel))
            start += numel + (paddings[number][index] if paddings else 0)
    return weights


def _from_partitions(groups: Any, optimizers: list[Any]) -> Weights:
    """ZeRO 3: every parameter is padded to equal parts, and each rank's parts lie one after the other."""
    if any(optimizer.get("ds_zero_partition_groups") for optimizer in optimizers):
        raise ModelError(
            "model.checkpoint: experts are partitioned over groups of their own (AutoEP at ZeRO 3); convert it with "
            "deepspeed.checkpoint.ds_to_universal and pass the result."
        )
    weights: Weights = {}
    start = 0
    for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
        length = -(-torch.Size(shape).numel() // len(optimizers))
        parts = [_stretch(optimizer["fp32_flat_groups"], start, length) for optimizer in optimizers]
        weights[name] = pieced(name, shape, [piece for pieces in parts for piece in pieces])
        start += length
    return weights


def _optimizers(folder: Path, mp_rank: int) -> list[Any]:
    """Return the optimizer states of all data-parallel ranks, in order. Raises ModelError where one is missing."""
    pattern = rf"((?:bf16_|fp16_)?)zero_pp_rank_(\d+)_mp_rank_{mp_rank:02d}_optim_states\.pt"
    files = {int(match[2]): path for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))}
    if not files:
        raise ModelError(
            f"'{folder}' has no *_mp_rank_{mp_rank:02d}_optim_states.pt, which hold the ZeRO weights; copy the files "
            "of all ranks, of all machines."
        )
    states = [load_mapped(files[rank])["optimizer_state_dict"] for rank in sorted(files)]
    count = states[0]["partition_count"]
    _check_ranks(folder, files, max(count) if isinstance(count, list) else count, "optim_states")
    return states


def _stretch(line: list[Tensor], start: int, length: int) -> list[Tensor]:
    """Return the elements start to start + length of tensors laid end to end, as views."""
    pieces = []
    for tensor in line:
        if start < tensor.numel() and length > 0:
            pieces.append(tensor[start : start + length])
            length -= pieces[-1].numel()
        start = max(0, start - tensor.numel())
    return pieces or [line[0][:0]]


def _check_ranks(folder: Path, found: Iterable[int], count: int, what: str) -> None:
    missing = sorted(set(range(count)) - set(found))
    if missing or len(set(found)) > count:
        told = f"that of rank {missing[0]} is missing" if missing else "files of another run lie among them"
        raise ModelError(
            f"'{folder}' was written by {count} data-parallel ranks, but holds {len(set(found))} *_{what}.pt: {told}. "
            "Copy the files of all ranks, of all machines."
        )
