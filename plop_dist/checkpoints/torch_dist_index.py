"""What a torch.distributed checkpoint's index (.metadata) may be made of: torch reads it with plain pickle."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem

from plop_dist.errors import ModelError, without_advice

_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"

# All that torch and Megatron-core (0.17 to 0.19) write into an index. None of these runs anything when it is made;
# torch's one function among them looks a layout up by its name.
_ALLOWED = frozenset(
    {
        *((f"{_DCP}.metadata", name) for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )),
        *((f"{_DCP}.planner", name) for name in (
            "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
        )),
        (f"{_DCP}.filesystem", "_StorageInfo"),
        (_MCORE, "MCoreMetadata"),
        (_MCORE, "MCoreSavePlan"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        *(("pathlib", name) for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")),
        *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")),  # Python 3.13's
        *(("builtins", name) for name in ("dict", "frozenset", "list", "set", "slice", "tuple")),
    }
)  # fmt: skip
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


def check_index(directory: Path) -> None:
    """Raise ModelError if reading the index would make or call anything but the classes that belong there."""
    index = directory / ".metadata"
    try:
        with index.open("rb") as file:
            _IndexUnpickler(file).load()
    except _ForeignError as error:
        raise ModelError(
            f"model.checkpoint '{directory}': its index (.metadata) would run {error} when it is read, which no "
            "checkpoint needs; do not use this file."
        ) from None
    except Exception as error:  # whatever a truncated pickle comes to
        raise ModelError(
            f"model.checkpoint '{directory}': its index (.metadata) cannot be read "
            f"({type(error).__name__}: {without_advice(str(error))}); copy the whole directory, hidden files included."
        ) from error


@contextmanager
def indexes_checked() -> Iterator[None]:
    """Have torch read every index of the block in the same way: it may be another one than was checked."""
    home: Any = filesystem
    own, reader = home.pickle, ModuleType("pickle")
    vars(reader).update(vars(own), load=lambda file: _IndexUnpickler(file).load())
    home.pickle = reader
    try:
        yield
    finally:
        home.pickle = own


class _ForeignError(Exception):
    pass


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Protocol 4 resolves a name with dots step by step, so that harmless modules lead to any other.
        if "." not in name:
            if (module, name) in _ALLOWED:
                found = super().find_class(module, name)
                if found.__module__ in (module, "pathlib._local"):
                    return found
            elif module == "torch" and isinstance(vars(torch).get(name), _CONSTANTS):
                return vars(torch)[name]
        raise _ForeignError(f"{module}.{name}"[:200])
