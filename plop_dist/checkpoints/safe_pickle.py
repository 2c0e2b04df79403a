"""Reads a torch.save file without running anything that it holds, and has frameworks read theirs so."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from plop_dist.errors import ModelError, first_line

# What training jobs pickle beside tensors. None of it is needed: a stand-in takes its place, so that nothing of it is
# imported or called. Anything else is refused.
_KNOWN = ("deepspeed.", "numpy.", "argparse.Namespace", "transformers.", "accelerate.", "megatron.")


# The only classes that DeepSpeed needs back from its own files; they are made of numbers and slices.
DEEPSPEED = (
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
_FORCE, _FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _StandIn:
    """Takes the place of a pickled object and forgets what it was made of."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_mapped(file: Path) -> Any:
    """Return the file's content with its tensors as views of the mapped file. Raises ModelError.

    Objects of the classes that DeepSpeed and training jobs put there come as stand-ins; other classes are refused.
    """
    if not file.is_file():
        raise ModelError(f"'{file}' is missing from the checkpoint; copy the files of all ranks, of all machines.")
    try:
        names = get_unsafe_globals_in_checkpoint(str(file))
        foreign = sorted(name for name in names if not name.startswith(_KNOWN))
        if foreign:
            raise ModelError(
                f"'{file}' holds pickled objects of '{foreign[0]}', which have no place in a checkpoint; it was not "
                "opened. Save it again without them (client_state), or convert it where you trust it."
            )
        with safe_globals([(_StandIn, name) for name in names]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except ModelError:
        raise
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        said = first_line(error).partition(". ")[0]
        raise ModelError(
            f"'{file}' cannot be read ({said[:200]}); it is cut off or not a file of torch.save: copy it again."
        ) from None  # torch's own text says how to load it all the same


@contextmanager
def tensors_only() -> Iterator[None]:
    """Have every torch.load of the block load tensors and plain values alone, whatever its caller asks for.

    torch's DCP and DeepSpeed pass weights_only=False. DeepSpeed's own classes are let through where it is in use.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORBID)}
    os.environ[_FORCE] = "1"
    try:
        with safe_globals([getattr(sys.modules[home], name) for home, name in DEEPSPEED if home in sys.modules]):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
