"""What the engines share that train one module with whole logits: PEFT's replicas and both tensor parallelisms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plop_dist.config.schema import Config
from plop_dist.training.adapters.shards import AdapterShard
from plop_dist.training.batch import Batch, batch_loss, read_batch, row_losses
from plop_dist.training.engines.deepspeed import DeepSpeedOptimizer
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.training.logits import Objective, Read
from plop_dist.training.sums import grad_norm


class WholeModelEngine:
    """Steps and evaluation of an Engine whose batches pass through one module on every rank of a replica.

    _trained: that module, DeepSpeed's engine where `optimizer` is DeepSpeed's.
    """

    _config: Config
    _trained: Any
    shards: list[AdapterShard]
    optimizer: AdapterOptimizer | DeepSpeedOptimizer
    device: torch.device
    dp_size: int

    def step(
        self,
        micro_batches: Sequence[Batch],
        num_targets: int,
        learning_rate: float,
        objective: Objective | None = None,
    ) -> tuple[float, float]:
        """Run one optimizer step. See Engine."""
        self._trained.train()
        if isinstance(self.optimizer, DeepSpeedOptimizer):
            self.optimizer.set_learning_rate(learning_rate)
            return self._deepspeed_step(micro_batches, num_targets, objective)
        total = 0.0
        for batch in micro_batches:
            loss = batch_loss(self._trained, batch, objective)
            (loss / num_targets).backward()
            total += float(loss.detach())
        return total, self.optimizer.step(learning_rate, self.device)

    def row_losses(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Return each row's loss without gradients. See Engine."""
        self._trained.eval()
        return row_losses(self._trained, micro_batches)

    @torch.no_grad()
    def read_logits(self, micro_batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """Return what is read of each micro-batch's logits. See RewardedEngine."""
        self._trained.eval()
        return [read_batch(self._trained, batch, read) for batch in micro_batches]

    def _deepspeed_step(
        self, micro_batches: Sequence[Batch], num_targets: int, objective: Objective | None
    ) -> tuple[float, float]:
        total = norm = 0.0
        # DeepSpeed averages over micro-batches and replicas; the loss is a mean over tokens.
        scale = len(micro_batches) * self.dp_size / num_targets
        stage = self._config.parallel.zero_stage
        for batch in micro_batches:
            loss = batch_loss(self._trained, batch, objective)
            total += float(loss.detach())
            self._trained.backward(loss * scale)
            if not stage and self._trained.is_gradient_accumulation_boundary():
                norm = grad_norm(self.shards, self.device)  # in float32 without ZeRO DeepSpeed keeps none
            self._trained.step()
        return total, float(self._trained.get_global_grad_norm()) if stage else norm
