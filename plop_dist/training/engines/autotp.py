"""Training under DeepSpeed's AutoTP, with data parallelism and ZeRO 0 or 1 over the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plop_dist.backends.deepspeed.autotp import scorable
from plop_dist.backends.hf.load import load_model, meta_model
from plop_dist.config.schema import Config
from plop_dist.training.adapters.placed import lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.tensor_parallel import add_adapters
from plop_dist.training.batch import Batch, batch_loss
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.deepspeed import deepspeed_config, initialize, training_engine
from plop_dist.training.loop import StepEngine
from plop_dist.training.sums import grad_norm
from plop_dist.values.placement import Placement


class AutoTPEngine:
    """An Engine over deepspeed.initialize with tensor_parallel.autotp_size."""

    def __init__(self, config: Config, placement: Placement):
        from deepspeed.utils import groups

        self._config, self._placement = config, placement
        model: Any = load_model(config.model)
        model.config.use_cache = False
        # The adapters are sized by AutoTP's shards, and the optimizer by the adapters: hence two engines in a row.
        sharding = {**deepspeed_config(config), "zero_optimization": {"stage": 0}}
        sharded = initialize(model, {**sharding, "tensor_parallel": {"autotp_size": config.parallel.tp}})
        module = sharded.module
        tp_group: Any = groups.get_tensor_model_parallel_group()
        self.shards = add_adapters(module, placement, lora_config(placement, config), tp_group, seed=config.train.seed)
        sharded.destroy()
        self._engine, self.optimizer = training_engine(module, self.shards, config, mpu=groups)
        dp_group: Any = groups.get_data_parallel_group()
        self.dp_group: dist.ProcessGroup | None = dp_group
        self.dp_rank, self.dp_size = dist.get_rank(dp_group), dist.get_world_size(dp_group)
        self.device: torch.device = self._engine.device

    def step(self, micro_batches: Sequence[Batch], num_targets: int, learning_rate: float) -> tuple[float, float]:
        """Run one optimizer step. See Engine."""
        self.optimizer.set_learning_rate(learning_rate)
        self._engine.train()
        total = norm = 0.0
        # DeepSpeed averages over micro-batches and replicas; the loss is a mean over tokens.
        scale = len(micro_batches) * self.dp_size / num_targets
        for batch in micro_batches:
            loss = batch_loss(self._engine, batch)
            total += float(loss.detach())
            self._engine.backward(loss * scale)
            if self._engine.is_gradient_accumulation_boundary() and not self._config.parallel.zero_stage:
                norm = grad_norm(self.shards, self.device)  # in float32 without ZeRO DeepSpeed keeps none
            self._engine.step()
        if self._config.parallel.zero_stage:
            norm = float(self._engine.get_global_grad_norm())
        return total, norm

    @torch.no_grad()
    def sum_loss(self, micro_batches: Sequence[Batch]) -> float:
        """Return the summed loss without gradients. See Engine."""
        self._engine.eval()
        return sum(float(batch_loss(self._engine, batch)) for batch in micro_batches)

    def tracked(self, with_head: bool) -> Tracked:
        """Return the adapted model for scoring. See Engine."""
        module = self._engine.module
        return Tracked(scorable(module, meta_model(self._config.model), with_head), [module])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self.shards, self._placement, self._config, dp_rank=self.dp_rank)

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back."""
        self._engine.destroy()


ENGINE = StepEngine(AutoTPEngine)
