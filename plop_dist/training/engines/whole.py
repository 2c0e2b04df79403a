"""Training whole replicas with PEFT: one process, or data parallelism whose gradients are summed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plop_dist import ranks
from plop_dist.backends.hf.load import load_model, meta_model
from plop_dist.backends.hf.whole import whole_model
from plop_dist.config.schema import Config
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import check_complete, lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.shards import peft_shards
from plop_dist.training.batch import Batch, batch_loss, read_batch
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.training.logits import Objective, Read
from plop_dist.training.loop import StepEngine
from plop_dist.values.placement import Placement


class WholeEngine:
    """An Engine over a transformers model that every rank holds whole."""

    def __init__(self, config: Config, placement: Placement):
        from peft import get_peft_model

        self._config, self._placement = config, placement
        base: Any = load_model(config.model)  # PEFT asks for transformers' class, of which load_model knows nothing
        self._model = get_peft_model(base, lora_config(placement, config))
        self.dp_rank, self.dp_size = ranks.rank(), config.parallel.dp
        self.dp_group: dist.ProcessGroup | None = dist.group.WORLD if self.dp_size > 1 else None
        self.device = next(self._model.parameters()).device
        self.shards = peft_shards(self._model)
        check_complete({shard.fqn for shard in self.shards}, placement)
        set_initial(self.shards, config.train.seed)
        self.optimizer = AdapterOptimizer(self.shards, config.train, self.dp_group)

    def step(
        self,
        micro_batches: Sequence[Batch],
        num_targets: int,
        learning_rate: float,
        objective: Objective | None = None,
    ) -> tuple[float, float]:
        """Run one optimizer step. See Engine."""
        self._model.train()
        total = 0.0
        for batch in micro_batches:
            loss = batch_loss(self._model, batch, objective)
            (loss / num_targets).backward()
            total += float(loss.detach())
        return total, self.optimizer.step(learning_rate, self.device)

    @torch.no_grad()
    def sum_loss(self, micro_batches: Sequence[Batch]) -> float:
        """Return the summed loss without gradients. See Engine."""
        self._model.eval()
        return sum(float(batch_loss(self._model, batch)) for batch in micro_batches)

    @torch.no_grad()
    def read_logits(self, micro_batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """Return what is read of each micro-batch's logits. See RewardedEngine."""
        self._model.eval()
        return [read_batch(self._model, batch, read) for batch in micro_batches]

    def generating(self) -> Any:
        """Return the model, which generates by itself. See RewardedEngine."""
        self._model.eval()
        return self._model

    def tracked(self, with_head: bool) -> Tracked:
        """Return the adapted model for scoring. See Engine."""
        base = self._model.get_base_model()
        return Tracked(whole_model(base, with_head, twin=meta_model(self._config.model)), [base])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self.shards, self._placement, self._config, dp_rank=self.dp_rank)

    def close(self) -> None:
        """Give back nothing: there is no engine besides the model."""


ENGINE = StepEngine(WholeEngine, methods=("grpo",))
