"""Weights from a Megatron torch_dist checkpoint of any layout, without running code that comes with it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from plop_dist.errors import ModelError, first_line

# Where the classes of a checkpoint's index come from; none of them runs anything when it is unpickled. torch's one
# function among them looks a layout up by its name.
_PLAIN = re.compile(
    r"(torch|collections|pathlib|(torch\.distributed\.checkpoint|megatron\.core\.dist_checkpointing)\..*)"
)
_BUILTINS = ("dict", "frozenset", "list", "set", "slice", "tuple")


def load_checkpoint(chunks: Sequence[nn.Module], directory: Path) -> None:
    """Load a torch_dist checkpoint, saved at whatever layout, into the chunks. Collective. Raises ModelError.

    directory: what dist_checkpointing.save wrote, alone or in Megatron-LM's iter_NNNNNNN beside
    latest_checkpointed_iteration.txt. Only weights are read: optimizer, random state and arguments are not.
    """
    from megatron.core import dist_checkpointing

    directory = _latest(directory)
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise ModelError(
            f"model.checkpoint '{directory}' is not a Megatron torch_dist checkpoint (no metadata.json in it); pass "
            "the directory that dist_checkpointing.save wrote, or one with latest_checkpointed_iteration.txt."
        )
    _check_index(directory)
    keys = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    wanted = {key: cast(Any, chunk).sharded_state_dict() for key, chunk in zip(keys, chunks, strict=True)}
    _check_keys(wanted, directory)
    try:
        with _weights_alone():
            loaded: Any = dist_checkpointing.load(wanted, str(directory))
        for key, chunk in zip(keys, chunks, strict=True):
            chunk.load_state_dict(loaded[key], strict=True)
    except (Exception, CheckpointException) as error:  # torch's own kind is a BaseException
        # torch's own message only says that there are some, by rank: (error, stack).
        failures = getattr(error, "failures", {})
        cause = next(iter(failures.values()))[0] if failures else error
        raise ModelError(
            f"model.checkpoint '{directory}' cannot be loaded into model.name_or_path's architecture "
            f"({type(cause).__name__}: {first_line(cause)}); check that both are the same model and the files are "
            "complete."
        ) from error


def _latest(directory: Path) -> Path:
    latest = directory / "latest_checkpointed_iteration.txt"
    if not latest.is_file():
        return directory
    text = latest.read_text().strip()
    if text == "release":
        return directory / "release"
    if not text.isdigit():
        raise ModelError(f"model.checkpoint: '{latest}' holds '{text}', neither an iteration's number nor 'release'.")
    return directory / f"iter_{int(text):07d}"


def _check_keys(wanted: dict[str, Any], directory: Path) -> None:
    """Raise ModelError naming a weight that the checkpoint lacks, or holds in another shape."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    have = dist_checkpointing.load_tensors_metadata(str(directory))
    built = [value.build() if isinstance(value, ShardedTensorFactory) else value for value in nested_values(wanted)]
    for tensor in (part for part in nested_values(built) if isinstance(part, ShardedTensor)):
        found = have.get(tensor.key)
        if found is None:
            some = f" (it has '{min(have)}')" if have else ""
            raise ModelError(
                f"model.checkpoint '{directory}' has no '{tensor.key}'{some}; it is a checkpoint of another "
                "architecture than model.name_or_path's, or of adapters alone."
            )
        if found.global_shape != tensor.global_shape and not tensor.allow_shape_mismatch:
            raise ModelError(
                f"model.checkpoint '{directory}': '{tensor.key}' is {tuple(found.global_shape)}, and "
                f"model.name_or_path's is {tuple(tensor.global_shape)}; both must be the same model."
            )


def _check_index(directory: Path) -> None:
    """Raise ModelError if unpickling the checkpoint's index would run anything but torch's own data classes.

    torch.distributed.checkpoint reads .metadata with plain pickle.
    """
    index = directory / ".metadata"
    try:
        with index.open("rb") as file:
            _PlainUnpickler(file).load()
    except _ForeignError as error:
        raise ModelError(
            f"model.checkpoint '{directory}': its index (.metadata) would run {error} when it is read, which no "
            "checkpoint needs; do not use this file."
        ) from None
    except Exception as error:  # whatever a truncated pickle comes to
        raise ModelError(
            f"model.checkpoint '{directory}': its index (.metadata) cannot be read ({type(error).__name__}: {error}); "
            "copy the whole directory, hidden files included."
        ) from error


class _ForeignError(Exception):
    pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if _PLAIN.fullmatch(module) or (module == "builtins" and name in _BUILTINS):
            found = super().find_class(module, name)
            if isinstance(found, type | torch.dtype | torch.layout | torch.memory_format):
                return found
        raise _ForeignError(f"{module}.{name}")


@contextmanager
def _weights_alone() -> Iterator[None]:
    """Keep Megatron from reading common.pt (arguments, iteration, scheduler): a pickle, and no weight is in it."""
    from megatron.core.dist_checkpointing import serialization

    own = serialization.load_common_state_dict
    serialization.load_common_state_dict = lambda *_, **__: {}
    try:
        yield
    finally:
        serialization.load_common_state_dict = own
