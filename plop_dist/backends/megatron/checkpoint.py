"""Weights from a Megatron torch_dist checkpoint of any layout, without running code that comes with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from plop_dist.backends.megatron.checkpoint_keys import match_keys
from plop_dist.checkpoints.safe_pickle import tensors_only
from plop_dist.checkpoints.torch_dist_index import check_index, indexes_checked
from plop_dist.errors import ModelError, as_cause, first_line

# Objects beside the weights: FP8 scales, pickled, which no score needs. Transformer Engine would unpickle them.
_OBJECTS = "_extra_state"


def load_checkpoint(chunks: Sequence[nn.Module], directory: Path, vocab_size: int) -> None:
    """Load a torch_dist checkpoint, saved at whatever layout, into the chunks. Collective. Raises ModelError.

    directory: what dist_checkpointing.save wrote, alone or in Megatron-LM's iter_NNNNNNN beside
    latest_checkpointed_iteration.txt. vocab_size: without padding, of which the checkpoint may have more or less. Only
    weights are read: optimizer, random state and arguments are not.
    """
    from megatron.core import dist_checkpointing

    directory = _latest(directory)
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise ModelError(
            f"model.checkpoint '{directory}' is not a Megatron torch_dist checkpoint (no metadata.json in it); pass "
            "the directory that dist_checkpointing.save wrote, or one with latest_checkpointed_iteration.txt."
        )
    check_index(directory)
    keys = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    wanted = {key: _tensors(cast(Any, chunk).sharded_state_dict()) for key, chunk in zip(keys, chunks, strict=True)}
    with indexes_checked():
        match_keys(wanted, directory, vocab_size)
    try:
        with _weights_alone(), tensors_only(), indexes_checked():
            loaded: Any = dist_checkpointing.load(wanted, str(directory))
        for key, chunk in zip(keys, chunks, strict=True):
            _put(chunk, loaded.get(key, {}))  # a stage may hold no layers
    except (Exception, CheckpointException) as error:  # torch's own kind is a BaseException
        # torch's own message only says that there are some, by rank: (error, stack).
        failures = getattr(error, "failures", {})
        cause = next(iter(failures.values()))[0] if failures else error
        raise ModelError(
            f"model.checkpoint '{directory}' cannot be loaded into model.name_or_path's architecture "
            f"({type(cause).__name__}: {first_line(cause)}); check that both are the same model and the files are "
            "complete."
        ) from as_cause(cause)


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


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return a sharded state dict without the objects in it, whatever a checkpoint says that they are."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return {
        name: value
        for name, value in state.items()
        if not isinstance(value, ShardedObject) and not name.rpartition(".")[2].startswith(_OBJECTS)
    }


def _put(chunk: nn.Module, state: dict[str, Any]) -> None:
    """Load the tensors into a chunk that keeps its own objects. Raises RuntimeError unless that is all it needs."""
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    lost = [name for name in missing if not name.rpartition(".")[2].startswith(_OBJECTS)] + unexpected
    if lost:
        raise RuntimeError(f"'{lost[0]}' is in only one of the two")


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
