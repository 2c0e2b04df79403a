"""Reads a torch.save file without running anything that it holds, its tensors mapped instead of copied."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from plop_dist.errors import ModelError, first_line

# What training jobs pickle beside tensors. None of it is needed: a stand-in takes its place, so that nothing of it is
# imported or called. Anything else is refused.
_KNOWN = ("deepspeed.", "numpy.", "argparse.Namespace", "transformers.", "accelerate.", "megatron.")


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
        ) from error
