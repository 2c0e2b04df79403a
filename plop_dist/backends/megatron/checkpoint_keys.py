"""Whether a torch_dist checkpoint holds the model's weights, all of them and no others, whichever layers wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plop_dist.backends.megatron.checks import gather_set
from plop_dist.errors import ModelError

# The same norm's name inside Transformer Engine's linear, and as a layer of its own.
_NORMS = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.in_proj.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
)
# Tensors that are no weights: an optimizer's, and FP8 scales; and layers that Hugging Face models do not have.
_BESIDE = ("optimizer", "chained_", "rng_state", "rerun_state", "mtp.")


def match_keys(wanted: Mapping[str, Any], directory: Path, vocab_size: int) -> None:
    """Give every wanted tensor the name under which the checkpoint holds it. Collective over the world.

    wanted: sharded state dicts of this rank; their tensors' keys change. vocab_size: without padding. Raises ModelError
    naming a weight that the checkpoint lacks, holds in another shape, or holds and the model has no place for.
    """
    from megatron.core import dist_checkpointing

    have: Any = dist_checkpointing.load_tensors_metadata(str(directory))
    for tensor in _tensors(wanted):
        if tensor.key not in have:
            tensor.key = next((key for key in _other_names(tensor.key) if key in have), tensor.key)
    # Every rank hears of what is wrong on any, before it waits for the others.
    faults = gather_set(filter(None, (_fault(tensor, have, vocab_size) for tensor in _tensors(wanted))))
    if faults:
        raise ModelError(f"model.checkpoint '{directory}'{min(faults)}")
    read = gather_set(tensor.key for tensor in _tensors(wanted))
    unread = sorted(key for key in have if key not in read and not _is_beside(key))
    if unread:
        raise ModelError(
            f"model.checkpoint '{directory}' holds {len(unread)} weights that model.name_or_path's model has no place "
            f"for, e.g. '{unread[0]}': it was written by another model (one with biases, or an untied head), and would "
            "be scored without them; let model.name_or_path be the checkpoint's own configuration."
        )


def _fault(tensor: Any, have: Mapping[str, Any], vocab_size: int) -> str | None:
    """Return what is wrong with one wanted tensor, None where nothing is."""
    found = have.get(tensor.key)
    if found is None:
        some = f" (it has '{min(have)}')" if have else ""
        return (
            f" has no '{tensor.key}'{some}; it is a checkpoint of another architecture than model.name_or_path's, or "
            "of adapters alone."
        )
    if _fits(tensor, found.global_shape, vocab_size):
        return None
    return (
        f": '{tensor.key}' is {tuple(found.global_shape)}, and model.name_or_path's is {tuple(tensor.global_shape)}; "
        "both must be the same model."
    )


def _is_beside(key: str) -> bool:
    return key.startswith(_BESIDE) or "_extra_state" in key


def _tensors(wanted: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the sharded tensors; of one that is made of others (gate and up) these share its key."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for value in nested_values(dict(wanted)):
        parts = nested_values({"": value.build()}) if isinstance(value, ShardedTensorFactory) else [value]
        yield from (part for part in parts if isinstance(part, ShardedTensor))


def _other_names(key: str) -> Iterator[str]:
    for inside, apart in _NORMS:
        for old, new in ((inside, apart), (apart, inside)):
            if old in key:
                yield key.replace(old, new)


def _fits(tensor: Any, found: tuple[int, ...], vocab_size: int) -> bool:
    """Tell whether shapes agree; a vocabulary may be padded otherwise, and all its rows must be there."""
    want = tuple(tensor.global_shape)
    if not tensor.allow_shape_mismatch or len(found) != len(want):
        return tuple(found) == want
    return found[0] >= min(vocab_size, want[0]) and tuple(found[1:]) == want[1:]
