"""Checkpoints of the trainable state: one file per rank, complete or absent, the last two kept, plain tensors only."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plop_dist.config import Config
from plop_dist.files import write_bytes, write_json
from plop_dist.placement import Placement
from plop_dist.run_dir import input_files

_KEPT = 2


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training run in `directory`; only those with the same fingerprint are its own."""

    directory: Path
    fingerprint: str

    def save(self, step: int, state: dict[str, Any], progress: dict[str, Any]) -> None:
        """Write this rank's `state` and, once every rank has, the mark that makes the checkpoint complete.

        state: tensors and plain values; progress: JSON values, the same on every rank. Collective over all ranks.
        Raises RunDirError when the directory cannot be written.
        """
        target = self.directory / f"step-{step:08d}"
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(target / f"rank-{_rank():05d}.pt", buffer.getvalue())
        _barrier()
        if _rank() == 0:
            write_json(target / "complete.json", {"step": step, "fingerprint": self.fingerprint, "progress": progress})
            self._remove_old()
        _barrier()

    def load_last(self) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Return (step, this rank's state, progress) of the last complete checkpoint, or None. Collective.

        Rank 0 looks and the others follow, so that all ranks continue from the same step.
        """
        found: list[Any] = [self._complete()[-1:] if _rank() == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        if not found[0]:
            return None
        target, mark = found[0][0]
        state = torch.load(Path(target) / f"rank-{_rank():05d}.pt", map_location="cpu", weights_only=True)
        return mark["step"], state, mark["progress"]

    def _complete(self) -> list[tuple[str, dict[str, Any]]]:
        marks = [(path.parent, json.loads(path.read_text())) for path in self.directory.glob("step-*/complete.json")]
        own = [(str(target), mark) for target, mark in marks if mark["fingerprint"] == self.fingerprint]
        return sorted(own, key=lambda item: item[1]["step"])

    def _remove_old(self) -> None:
        kept = {target for target, _ in self._complete()[-_KEPT:]}
        for path in self.directory.glob("step-*"):
            if str(path) not in kept:
                shutil.rmtree(path)


def fingerprint(config: Config, placement: Placement) -> str:
    """Return a digest of all that a checkpoint depends on: model, data, their files, layout, training and adapters."""
    parts = {
        "model": config.model.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "files": input_files(config),
        "parallel": config.parallel.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json", exclude={"save_steps", "loggers", "track_nfn_every"}),
        "placement": [placement.modules, placement.rank, placement.alpha, placement.rank_pattern],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
