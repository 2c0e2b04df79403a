"""Finds a model's weights in what DeepSpeed's save_checkpoint or ds_to_universal wrote, without reading them.

Written from the layout of the files (DeepSpeed 0.19.8: utils/zero_to_fp32.py, checkpoint/ds_to_universal.py); DeepSpeed
itself is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.safe_pickle import load_mapped
from plop_dist.backends.unread import UnreadTensor
from plop_dist.checkpoint_folder import find_weights_folder
from plop_dist.errors import ModelError

Weights = dict[str, UnreadTensor]

_CONVERT = (
    "merge them with `python -m deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder OUT` and "
    "pass model.checkpoint=OUT"
)


def find_weights(directory: str | Path, model: nn.Module) -> Weights:
    """Return every entry of the model's state dict, unread, from a DeepSpeed checkpoint of any layout.

    model: on the meta device, gives names and shapes. Weights that ZeRO trains come in float32 from the optimizer's
    master copies, the others (frozen ones, and all without ZeRO) as the module held them.

    Raises ModelError for missing or damaged files, another model's parameters, or shards that cannot be put together.
    """
    folder, kind = find_weights_folder(directory)
    if kind == "megatron":
        raise ModelError(
            f"model.checkpoint '{directory}' is a Megatron torch_dist checkpoint, which only parallel.backend=megatron "
            "reads."
        )
    _refuse_shards(folder)
    layers = _layer_files(folder)
    weights: Weights = {}
    for index, file in layers.items():
        for name, tensor in load_mapped(file).items():
            weights[f"{index}.{name}"] = _whole(tensor)
    for mp_rank in _mp_ranks(folder):
        weights |= _of_mp_rank(folder, mp_rank, has_masters=kind == "deepspeed")
    if kind == "universal":
        weights |= dict(_universal(folder / "zero", weights, dict(model.state_dict())))
    if layers:
        weights = {_path_in_model(name, model, folder): unread for name, unread in weights.items()}
    return _checked(weights, model, directory)


def _of_mp_rank(folder: Path, mp_rank: int, has_masters: bool) -> Weights:
    """Return the weights that one model-parallel rank's files hold: of the whole model, or of a pipeline's stage."""
    ranks = sorted(_numbers(folder, rf"zero_pp_rank_(\d+)_mp_rank_{mp_rank:02d}_model_states\.pt"))
    if not ranks:
        state = load_mapped(folder / f"mp_rank_{mp_rank:02d}_model_states.pt")
        weights = {name: _whole(tensor) for name, tensor in (state["module"] or {}).items()}
        # Without ZeRO the masters have no names; the module then holds what the job computed with.
        if has_masters and state.get("param_shapes"):
            weights |= _from_flat_groups(state["param_shapes"], _optimizers(folder, mp_rank))
        return weights | _shared(state, weights)
    states = [load_mapped(folder / f"zero_pp_rank_{rank}_mp_rank_{mp_rank:02d}_model_states.pt") for rank in ranks]
    _check_ranks(folder, ranks, states[0]["dp_world_size"], "model_states")
    buffers = set(states[0]["buffer_names"])
    weights = {name: _whole(tensor) for name, tensor in states[0]["module"].items() if name in buffers}
    for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
        weights[name] = _pieced(name, shape, [state["frozen_param_fragments"][name] for state in states])
    if has_masters:
        weights |= _from_partitions(states[0]["param_shapes"], _optimizers(folder, mp_rank))
    return weights | _shared(states[0], weights)


def _from_flat_groups(groups: Any, optimizers: list[Any]) -> Weights:
    """ZeRO 1 and 2: a group's parameters lie one after the other, and the ranks hold equal stretches of that line."""
    weights: Weights = {}
    paddings = optimizers[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        line = [optimizer["single_partition_of_fp32_groups"][number] for optimizer in optimizers]
        start = 0
        for index, (name, shape) in enumerate(shapes.items()):
            numel = torch.Size(shape).numel()
            weights[name] = _pieced(name, shape, _stretch(line, start, numel))
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
        weights[name] = _pieced(name, shape, [piece for pieces in parts for piece in pieces])
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


def _universal(
    zero: Path, known: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[tuple[str, UnreadTensor]]:
    """Yield the parameters of a universal checkpoint, each merged in a file of its own; ZeRO 3 leaves them flat."""
    for folder in sorted(path for path in zero.iterdir() if path.is_dir()):
        content = load_mapped(folder / "fp32.pt")
        tensor = content["param"] if isinstance(content, dict) else content
        target = expected.get(folder.name, known.get(folder.name))
        fits = target is not None and tensor.dim() == 1 and tensor.numel() == target.numel()
        yield folder.name, _pieced(folder.name, target.shape if fits else tensor.shape, [tensor])


def _shared(state: Any, weights: Weights) -> Weights:
    """Return the names of tied parameters that are not stored themselves."""
    shared = state.get("shared_params") or {}
    return {name: weights[source] for name, source in shared.items() if source in weights}


def _whole(tensor: Tensor) -> UnreadTensor:
    return UnreadTensor(tensor.shape, [tensor.reshape(-1)])


def _pieced(name: str, shape: Iterable[int], pieces: list[Tensor]) -> UnreadTensor:
    shape = torch.Size(shape)
    flat = [piece.reshape(-1) for piece in pieces]
    found = sum(piece.numel() for piece in flat)
    if found < shape.numel():
        raise ModelError(
            f"model.checkpoint holds {found} of the {shape.numel()} elements of '{name}' {tuple(shape)}; files of "
            "another job lie among its own, or one was cut off: copy it again."
        )
    return UnreadTensor(shape, flat)


def _stretch(line: list[Tensor], start: int, length: int) -> list[Tensor]:
    """Return the elements start to start + length of tensors laid end to end, as views."""
    pieces = []
    for tensor in line:
        if start < tensor.numel() and length > 0:
            pieces.append(tensor[start : start + length])
            length -= pieces[-1].numel()
        start = max(0, start - tensor.numel())
    return pieces or [line[0][:0]]


def _mp_ranks(folder: Path) -> list[int]:
    return sorted(_numbers(folder, r"(?:zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt"))


def _layer_files(folder: Path) -> dict[int, Path]:
    """Return a pipeline's files by the layer's place in it; empty for a model that was not cut into stages."""
    files = {}
    for path in folder.glob("layer_*-model_states.pt"):
        match = re.fullmatch(r"layer_(\d+)(?:-model_00)?-model_states\.pt", path.name)
        if match:
            files[int(match[1])] = path
    return files


def _refuse_shards(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()]
    if any("_expert_" in name or name.startswith("expp_rank") for name in names):
        raise ModelError(
            f"'{folder}' keeps the experts of DeepSpeed's MoE layers in files of their own, which are no modules of "
            "transformers; save the model with save_pretrained and pass that as model.name_or_path."
        )
    is_pipeline = any(name.startswith("layer_") for name in names)
    has_slices = any(re.match(r"layer_\d+-model_(?!00-)", name) for name in names)
    if (folder / "zero").is_dir() or not (has_slices or (len(_mp_ranks(folder)) > 1 and not is_pipeline)):
        return
    raise ModelError(
        f"'{folder}' holds tensor-parallel shards ({len(_mp_ranks(folder))} mp_rank files), which only DeepSpeed puts "
        f"together: {_CONVERT.format(folder=folder)}."
    )


def _check_ranks(folder: Path, found: Iterable[int], count: int, what: str) -> None:
    missing = sorted(set(range(count)) - set(found))
    if missing or len(set(found)) > count:
        told = f"that of rank {missing[0]} is missing" if missing else "files of another run lie among them"
        raise ModelError(
            f"'{folder}' was written by {count} data-parallel ranks, but holds {len(set(found))} *_{what}.pt: {told}. "
            "Copy the files of all ranks, of all machines."
        )


def _numbers(folder: Path, pattern: str) -> set[int]:
    return {int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))}


def _path_in_model(name: str, model: Any, folder: Path) -> str:
    """Return the model's name of a parameter of backends.deepspeed_pipeline.pipeline_layers: 1.layer.* and so on."""
    index, _, rest = name.partition(".")
    body, last = model.base_model_prefix, model.config.num_hidden_layers + 1
    place = int(index) if index.isdigit() else -1
    if place == 0 and rest.startswith("embed_tokens."):
        return f"{body}.{rest}"
    if 0 < place < last and rest.startswith("layer."):
        return f"{body}.layers.{place - 1}.{rest.removeprefix('layer.')}"
    if place == last and rest.startswith("norm."):
        return f"{body}.{rest}"
    if place == last and rest.startswith("lm_head."):
        return rest
    raise ModelError(
        f"'{folder}' holds the pipeline layer parameter '{name}', whose place in {type(model).__name__} with "
        f"{last - 1} layers is not certain: only plop_dist.backends.deepspeed_pipeline.pipeline_layers are read. "
        "Save the model with its own conversion to Hugging Face and pass that as model.name_or_path."
    )


def _checked(weights: Weights, model: nn.Module, directory: str | Path) -> Weights:
    """Return exactly the model's entries. Raises ModelError where names or shapes are not the model's."""
    expected = dict(model.state_dict())
    if any(".lora_" in name or name.startswith("base_model.model.") for name in weights):
        raise ModelError(
            f"model.checkpoint '{directory}' is of a model with LoRA adapters; merge them, save the model with "
            "save_pretrained, and pass that as model.name_or_path."
        )
    if not weights.keys() & expected.keys():  # a wrapper around the model puts its own name before every other
        weights = {name.removeprefix("module.").removeprefix("_orig_mod."): unread for name, unread in weights.items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(expected.keys() - weights.keys() - tied)
    foreign = sorted(weights.keys() - expected.keys())
    if missing or foreign:
        what = f"lacks '{missing[0]}'" if missing else f"holds '{foreign[0]}', which the model does not have"
        count = f" ({len(missing)} of its {len(expected)} parameters are missing, {len(foreign)} are foreign)"
        raise ModelError(
            f"model.checkpoint '{directory}' is not of this {type(model).__name__}: it {what}{count}. Point "
            "model.name_or_path at the configuration that the checkpoint was trained with."
        )
    for name, unread in weights.items():
        if unread.shape != expected[name].shape:
            raise ModelError(
                f"model.checkpoint '{directory}' holds '{name}' with shape {tuple(unread.shape)}, but the "
                f"configuration of model.name_or_path makes it {tuple(expected[name].shape)}. Point model.name_or_path "
                "at the configuration that the checkpoint was trained with."
            )
    return weights
