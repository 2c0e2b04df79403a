"""A TRL trainer that is asked to stop ends after its step, with a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from plop_dist.training.stopping import Stopping


class StopCallback(TrainerCallback):
    """Ends the Trainer after the step in which the run is asked to stop, with a checkpoint."""

    def __init__(self, stopping: Stopping, device: torch.device) -> None:
        self._stopping, self._device = stopping, device

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look whether to stop. Collective over the world."""
        if self._stopping.is_asked(self._device):
            control.should_save = control.should_training_stop = True
