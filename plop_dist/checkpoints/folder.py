"""Which folder of a checkpoint directory holds the weights, and which framework left it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from plop_dist.errors import ModelError

Kind = Literal["deepspeed", "universal", "megatron"]


def find_weights_folder(directory: str | Path) -> tuple[Path, Kind]:
    """Return the folder with the weights, and what wrote it: DeepSpeed, its universal converter, or Megatron.

    directory: what engine.save_checkpoint, ds_to_universal, a Trainer (checkpoint-N) or dist_checkpointing.save wrote,
    or the folder of one step inside it. Raises ModelError.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelError(
            f"model.checkpoint '{directory}' is not a directory; pass the one that the training job wrote."
        )
    folder = directory
    for mark in ("latest", "latest_universal", "latest_checkpointed_iteration.txt"):
        if (directory / mark).is_file():
            step = (directory / mark).read_text(errors="replace").strip()[:255]
            if Path(step).name != step:
                raise ModelError(
                    f"model.checkpoint '{directory}': its file '{mark}' holds {step[:80]!a}, expected the name of a "
                    "folder beside it."
                )
            folder = directory / (f"iter_{int(step):07d}" if mark.endswith(".txt") and step.isdigit() else step)
            if not folder.is_dir():
                raise ModelError(
                    f"model.checkpoint '{directory}' names '{folder.name}' in its file '{mark}', but has no such "
                    "folder; copy the whole checkpoint, or pass the folder of another step."
                )
            break
    if (folder / "zero").is_dir():
        return folder, "universal"
    if any(folder.glob("*_model_states.pt")):
        return folder, "deepspeed"
    if (folder / "metadata.json").is_file():
        return folder, "megatron"
    steps = sorted(path.name for path in directory.iterdir() if path.is_dir())
    inside = f" Pass one of its folders: {', '.join(steps[:5])}." if steps else ""
    raise ModelError(
        f"model.checkpoint '{directory}' is no checkpoint that is known: expected a file 'latest' that names a "
        "step, *_model_states.pt files (DeepSpeed), a folder zero/ (universal) or metadata.json (Megatron "
        f"torch_dist).{inside}"
    )


def digest_of_files(directory: str | Path) -> str | None:
    """Return a digest of names, sizes and times of the files that would be read, None where there are none."""
    try:
        folder, _ = find_weights_folder(directory)
    except ModelError:
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.sha256(repr([folder.name, *parts]).encode()).hexdigest()[:16]
