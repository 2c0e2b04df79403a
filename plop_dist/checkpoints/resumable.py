"""Whether a folder that training goes on from holds data alone, whatever loads its files later."""

from __future__ import annotations

import re
import stat
import zipfile
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

from plop_dist.checkpoints.owner import other_owner
from plop_dist.checkpoints.safe_pickle import DEEPSPEED
from plop_dist.errors import RunDirError

# What trainers put there beside tensors: numpy's random state, and DeepSpeed's own classes.
_ALLOWED = frozenset(
    {
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.dtypes.UInt32DType",
        "numpy.ndarray",
        *(f"{module}.{name}" for module, name in DEEPSPEED),
    }
)
_PICKLE = b"\x80"  # how every pickle since protocol 2 begins; trainers leave none outside torch.save's archives
_STEP = re.compile(r"global_step\d+")  # DeepSpeed's


def check_resumable(folder: Path) -> None:
    """Raise RunDirError, naming the file, unless every file below the folder is data: nothing is loaded for it.

    DeepSpeed unpickles its files, and a Trainer adapters in folders of their own; so each is looked at by its content,
    under whatever name. Archives that are cut off are left to their loader, which says so.
    """
    for path in sorted(folder.rglob("*")):
        reason = _foreign(path, folder)
        if reason is not None:
            owner = other_owner(folder)
            whose = f", which belongs to {owner}," if owner else ""
            raise RunDirError(
                f"'{path}' {reason}, which no trainer leaves there; nothing of '{folder}'{whose} was loaded. Delete "
                "that folder: training goes on from an earlier checkpoint, or begins anew where there is none."
            )


def _foreign(path: Path, folder: Path) -> str | None:
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        is_known = path.parent == folder and _STEP.fullmatch(path.name)
        return None if is_known else "is a folder"
    if not stat.S_ISREG(mode):
        return "is a link" if stat.S_ISLNK(mode) else "is no regular file"
    if path.name == "latest":  # the folder that DeepSpeed loads, wherever it is
        name = path.read_bytes()[:200].decode(errors="replace").strip()
        return None if _STEP.fullmatch(name) else f"names {name!a}"
    with path.open("rb") as file:
        if file.read(1) == _PICKLE:
            return "is a pickle"
    return _foreign_object(path) if zipfile.is_zipfile(path) else None


def _foreign_object(path: Path) -> str | None:
    try:
        foreign = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - _ALLOWED)
    except RuntimeError:  # torch's reader: it is cut off
        return None
    except Exception as error:  # TorchScript, or instructions that torch.save never writes
        return f"is an archive, but none of torch.save ({type(error).__name__})"
    return f"holds pickled objects of {ascii(foreign[0])[:200]}" if foreign else None
