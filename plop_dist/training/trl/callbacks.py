"""What a TRL trainer does for us beside its steps: our log's entries, and the held-out loss."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from plop_dist import ranks
from plop_dist.errors import RunDirError
from plop_dist.training.batch import Batch, row_losses
from plop_dist.training.engine import Log
from plop_dist.training.grpo.metrics import is_metric
from plop_dist.training.loop import evaluate
from plop_dist.values.files import write_text


class LogCallback(TrainerCallback):
    """Hands the Trainer's own log entries to ours, under our names; state.num_input_tokens_seen gives the speed."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._began, self._num_tokens = 0.0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note what the step begins with."""
        self._began, self._num_tokens = time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write one step's entry."""
        if not logs or not {"loss", "reward"} & logs.keys():
            return
        speed = (state.num_input_tokens_seen - self._num_tokens) / (time.perf_counter() - self._began)
        entry: dict[str, Any] = {"step": state.global_step, "tokens_per_second": float(speed)}
        ours = ("loss", "learning_rate", "grad_norm", "reward", "reward_std")
        entry |= {key: float(v) for key, v in logs.items() if v is not None and (key in ours or is_metric(key))}
        if logs.get("completions/mean_length") is not None:
            entry["completion_length"] = float(logs["completions/mean_length"])
        means = {key.split("/")[1]: value for key, value in logs.items() if re.fullmatch(r"rewards/.+/mean", key)}
        if len(means) > 1:
            entry |= {f"reward/{name}": float(value) for name, value in means.items() if value is not None}
        self._log(entry)


class HeldOutCallback(TrainerCallback):
    """Measures the held-out loss with the model that trains, once it exists and after the last step.

    mark: the file that keeps the first loss for runs that continue this one.
    """

    def __init__(self, trainer: Any, held_out: Sequence[Batch], mark: Path) -> None:
        self._trainer, self._held_out, self._mark = trainer, held_out, mark
        self.before = self.after = float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure what training begins with. Collective over the world."""
        if state.global_step == 0:
            self.before = self._loss()
            if ranks.rank() == 0:
                write_text(self._mark, repr(self.before))
        else:  # resumed: the untrained model was measured by the run that was cut off
            self.before = _stored_loss(self._mark)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure what training has come to, if it has come to its end. Collective over the world."""
        if state.global_step >= state.max_steps:
            self.after = self._loss()

    def _loss(self) -> float:
        return evaluate(_Replicas(self._trainer), self._held_out)


def _stored_loss(mark: Path) -> float:
    """Return the loss that a file holds. Raises RunDirError."""
    try:
        if mark.is_file():
            return float(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    raise RunDirError(
        f"{mark} does not hold the loss that training began with; delete {mark.parent} to train from the beginning."
    )


class _Replicas:
    """The Trainer's model as loop.evaluate reads it: every rank is a replica."""

    def __init__(self, trainer: Any) -> None:
        self._model = trainer.model_wrapped
        self.dp_rank = ranks.rank()
        self.dp_size = dist.get_world_size() if dist.is_initialized() else 1
        self.dp_group: dist.ProcessGroup | None = dist.group.WORLD if self.dp_size > 1 else None
        self.device: torch.device = trainer.args.device

    def row_losses(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Return each row's loss without gradients. See Evaluating."""
        was_training = self._model.training
        self._model.eval()
        losses = row_losses(self._model, micro_batches)
        self._model.train(was_training)
        return losses
