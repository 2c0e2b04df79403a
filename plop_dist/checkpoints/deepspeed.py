"""Finds a model's weights in what DeepSpeed's save_checkpoint or ds_to_universal wrote, without reading them.

Written from the layout of the files (DeepSpeed 0.19.8: utils/zero_to_fp32.py, checkpoint/ds_to_universal.py); DeepSpeed
itself is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plop_dist.checkpoints.folder import Kind, find_weights_folder
from plop_dist.checkpoints.safe_pickle import load_mapped
from plop_dist.checkpoints.unread import UnreadTensor, unread_shards
from plop_dist.checkpoints.zero_files import Weights, find_partitioned, load_model_states, numbers, pieced, whole
from plop_dist.errors import ModelError

_CONVERT = (
    "merge them with `python -m deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder OUT` and "
    "pass model.checkpoint=OUT"
)


def find_weights(directory: str | Path, model: nn.Module, fused: Set[str]) -> Weights:
    """Return every entry of the model's state dict, unread, from a DeepSpeed checkpoint of any layout.

    model: on the meta device, gives names and shapes. fused: paths of its linears that hold several projections, which
    AutoTP cuts inside each of them. Weights that ZeRO trains come in float32 from the optimizer's
    master copies, the others (frozen ones, and all without ZeRO) as the module held them.

    Raises ModelError for missing or damaged files, another model's parameters, or shards that cannot be put together.
    """
    folder, kind = find_weights_folder(directory)
    if kind == "megatron":
        raise ModelError(
            f"model.checkpoint '{directory}' is a Megatron torch_dist checkpoint, which only parallel.backend=megatron "
            "reads."
        )
    try:
        return _checked(_find(folder, kind, model, fused), model, directory)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"model.checkpoint '{directory}' is not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: "
            f"{error}); convert it with its zero_to_fp32.py --safe_serialization and pass the result as "
            "model.name_or_path."
        ) from error


def _find(folder: Path, kind: Kind, model: nn.Module, fused: Set[str]) -> Weights:
    _refuse_shards(folder)
    layers = _layer_files(folder)
    weights: Weights = {}
    for index, file in layers.items():
        for name, tensor in load_mapped(file).items():
            weights[f"{index}.{name}"] = whole(tensor)
    tied: dict[str, str] = {}
    shards = []
    for mp_rank in _mp_ranks(folder):
        states = load_model_states(folder, mp_rank)
        shards.append(find_partitioned(folder, mp_rank, states, has_masters=kind == "deepspeed"))
        tied |= states[0].get("shared_params") or {}
    if layers or kind == "universal":  # each stage's own; tensor-parallel ones are merged in files of their own
        for stage in shards:
            weights |= stage
    else:
        weights = _joined([_unwrapped(shard, model) for shard in shards], model, fused, folder)
    if kind == "universal":
        weights |= dict(_universal(folder / "zero", weights, dict(model.state_dict())))
    # Last: of a tied pair only one is trained and converted, the other may still be there in 16 bit.
    weights |= {name: weights[source] for name, source in tied.items() if source in weights}
    if layers:
        weights = {_path_in_model(name, model, folder): unread for name, unread in weights.items()}
    return weights


def _joined(shards: list[Weights], model: nn.Module, fused: Set[str], folder: Path) -> Weights:
    """Return the weights of AutoTP's ranks put together: a parameter is whole on each, or cut along one dimension.

    Raises ModelError for fused linears, which AutoTP cuts inside each of their blocks.
    """
    if len(shards) == 1:
        return shards[0]
    expected = dict(model.state_dict())
    weights: Weights = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        target = expected.get(name, parts[0]).shape
        if all(part.shape == target for part in parts):
            weights[name] = parts[0]
            continue
        dims = [
            dim
            for dim, size in enumerate(target)
            if sum(part.shape[dim] for part in parts) == size
            and all((*p.shape[:dim], *p.shape[dim + 1 :]) == (*target[:dim], *target[dim + 1 :]) for p in parts)
        ]
        if len(dims) != 1 or name.rpartition(".")[0] in fused:
            raise ModelError(
                f"'{folder}' holds {len(shards)} tensor-parallel shards of '{name}' with shapes "
                f"{[tuple(part.shape) for part in parts]}, which only DeepSpeed puts together to {tuple(target)}: "
                f"{_CONVERT.format(folder=folder)}."
            )
        weights[name] = unread_shards(parts, dims[0])
    return weights


def _universal(
    zero: Path, known: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[tuple[str, UnreadTensor]]:
    """Yield the parameters of a universal checkpoint, each merged in a file of its own; ZeRO 3 leaves them flat."""
    for folder in sorted(path for path in zero.iterdir() if path.is_dir()):
        content = load_mapped(folder / "fp32.pt")
        tensor = content["param"] if isinstance(content, dict) else content
        target = expected.get(folder.name, known.get(folder.name))
        shape = tensor.shape
        if target is not None and tensor.dim() == 1 and tensor.numel() == target.numel():
            shape = target.shape
        yield folder.name, pieced(folder.name, shape, [tensor])


def _mp_ranks(folder: Path) -> list[int]:
    return sorted(numbers(folder, r"(?:zero_pp_rank_\d+_)?mp_rank_(\d+)_model_states\.pt"))


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
    if not (folder / "zero").is_dir() and any(re.match(r"layer_\d+-model_(?!00-)\d+-", name) for name in names):
        raise ModelError(
            f"'{folder}' holds tensor-parallel shards of a pipeline's layers ({len(_mp_ranks(folder))} mp_rank files), "
            f"which only DeepSpeed puts together: {_CONVERT.format(folder=folder)}."
        )


def _unwrapped(weights: Weights, model: nn.Module) -> Weights:
    """Return the weights without the name that a wrapper around the model puts before every other."""
    if weights.keys() & model.state_dict().keys():
        return weights
    return {name.removeprefix("module.").removeprefix("_orig_mod."): unread for name, unread in weights.items()}


def _path_in_model(name: str, model: Any, folder: Path) -> str:
    """Return the model's name of a parameter of backends.deepspeed.stack.pipeline_layers: 1.layer.* and so on."""
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
        f"{last - 1} layers is not certain: only plop_dist.backends.deepspeed.stack.pipeline_layers are read. "
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
    weights = _unwrapped(weights, model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(expected.keys() - weights.keys() - tied)
    foreign = sorted(weights.keys() - expected.keys())
    if missing or foreign:
        what = f"lacks '{missing[0]}'" if missing else f"holds '{foreign[0]}', which the model does not have"
        count = f" ({len(missing)} of its {len(expected)} parameters are missing, {len(foreign)} are foreign)"
        remedy = "Point model.name_or_path at the configuration that the checkpoint was trained with"
        if not foreign:
            remedy += "; if it was saved with exclude_frozen_parameters, save it again without"
        raise ModelError(
            f"model.checkpoint '{directory}' is not of this {type(model).__name__}: it {what}{count}. {remedy}."
        )
    for name, unread in weights.items():
        if unread.shape != expected[name].shape:
            raise ModelError(
                f"model.checkpoint '{directory}' holds '{name}' with shape {tuple(unread.shape)}, but the "
                f"configuration of model.name_or_path makes it {tuple(expected[name].shape)}. Point model.name_or_path "
                "at the configuration that the checkpoint was trained with."
            )
    return weights
