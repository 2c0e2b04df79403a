"""Checkpoints of the trainable state: one file per rank, complete or absent, the last two kept, plain tensors only."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plop_dist import ranks
from plop_dist.checkpoints.resumable import check_resumable
from plop_dist.config.schema import Config
from plop_dist.rundir.stages import input_files
from plop_dist.values.files import write_bytes, write_json
from plop_dist.values.placement import Placement

WITHOUT_IT = "training goes on from an earlier checkpoint, or begins anew where there is none."
_KEPT = 2
_WITHOUT_EFFECT = {"save_steps", "loggers", "track_nfn_every", "reward_timeout_s", "vllm"}

logger = logging.getLogger(__name__)


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
        write_bytes(target / _file_name(), buffer.getvalue())
        ranks.barrier()
        if ranks.rank() == 0:
            write_json(target / "complete.json", {"step": step, "fingerprint": self.fingerprint, "progress": progress})
            self._remove_old()
        ranks.barrier()

    def load_last(self) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Return (step, this rank's state, progress) of the last complete checkpoint, or None. Collective.

        Rank 0 looks and the others follow, so that all ranks continue from the same step: one that every rank can read.
        Raises RunDirError for one that holds more than tensors and plain values.
        """
        for target, mark in reversed(ranks.agree(self._complete)):
            ranks.agree(partial(check_resumable, Path(target)))
            state = _read(Path(target) / _file_name())
            damaged = [rank for rank, is_read in enumerate(ranks.gathered(state is not None)) if not is_read]
            if not damaged and state is not None:
                return mark["step"], state, mark["progress"]
            if ranks.rank() == 0:
                logger.warning("%s: the part of rank %d is damaged; %s", target, damaged[0], WITHOUT_IT)
        return None

    def _complete(self) -> list[tuple[str, dict[str, Any]]]:
        own = []
        for path in self.directory.glob("step-*/complete.json"):
            with suppress(ValueError, KeyError, TypeError):  # a mark that was cut off marks nothing
                mark = json.loads(path.read_text())
                if mark["fingerprint"] == self.fingerprint:
                    own.append((str(path.parent), {"step": int(mark["step"]), "progress": dict(mark["progress"])}))
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
        "train": config.train.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
        "widen": config.export.widen,
        "placement": [placement.modules, placement.rank, placement.alpha, placement.rank_pattern],
    }
    if config.train.vllm.url is not None:  # where a server is does not matter, but that one samples does
        parts["sampler"] = "vllm"
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file_name() -> str:
    return f"rank-{ranks.rank():05d}.pt"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises whatever the damaged bytes lead it to
        return None
