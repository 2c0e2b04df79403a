"""Training under DeepSpeed's AutoTP, with data parallelism and ZeRO 0 or 1 over the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.backends.deepspeed.autotp import scorable
from plop_dist.backends.deepspeed.late_dtype import loaded_to_be_cut
from plop_dist.backends.hf.load import meta_model
from plop_dist.config.schema import Config
from plop_dist.training.adapters.placed import lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.shards import remove_wrapped
from plop_dist.training.adapters.tensor_parallel import TensorParallelLoRA, add_adapters
from plop_dist.training.batch import Batch, batch_loss, read_batch, row_losses
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.deepspeed import deepspeed_config, initialize, training_engine
from plop_dist.training.logits import Objective, Read
from plop_dist.training.loop import StepEngine
from plop_dist.training.sums import grad_norm
from plop_dist.values.placement import Placement


class AutoTPEngine:
    """An Engine over deepspeed.initialize with tensor_parallel.autotp_size."""

    def __init__(self, config: Config, placement: Placement, base: nn.Module | None = None):
        from deepspeed.utils import groups

        self._config, self._placement = config, placement
        # The adapters are sized by AutoTP's shards, and the optimizer by the adapters: hence two engines in a row.
        module = load(config) if base is None else base
        tp_group: Any = groups.get_tensor_model_parallel_group()
        self.shards = add_adapters(module, placement, lora_config(placement, config), tp_group, seed=config.train.seed)
        self._engine, self.optimizer = training_engine(module, self.shards, config, mpu=groups)
        dp_group: Any = groups.get_data_parallel_group()
        self.dp_group: dist.ProcessGroup | None = dp_group
        self.dp_rank, self.dp_size = dist.get_rank(dp_group), dist.get_world_size(dp_group)
        self.device: torch.device = self._engine.device

    def step(
        self,
        micro_batches: Sequence[Batch],
        num_targets: int,
        learning_rate: float,
        objective: Objective | None = None,
    ) -> tuple[float, float]:
        """Run one optimizer step. See Engine."""
        self.optimizer.set_learning_rate(learning_rate)
        self._engine.train()
        total = norm = 0.0
        # DeepSpeed averages over micro-batches and replicas; the loss is a mean over tokens.
        scale = len(micro_batches) * self.dp_size / num_targets
        for batch in micro_batches:
            loss = batch_loss(self._engine, batch, objective)
            total += float(loss.detach())
            self._engine.backward(loss * scale)
            if self._engine.is_gradient_accumulation_boundary() and not self._config.parallel.zero_stage:
                norm = grad_norm(self.shards, self.device)  # in float32 without ZeRO DeepSpeed keeps none
            self._engine.step()
        if self._config.parallel.zero_stage:
            norm = float(self._engine.get_global_grad_norm())
        return total, norm

    def row_losses(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Return each row's loss without gradients. See Engine."""
        self._engine.eval()
        return row_losses(self._engine, micro_batches)

    @torch.no_grad()
    def read_logits(self, micro_batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """Return what is read of each micro-batch's logits. See RewardedEngine."""
        self._engine.eval()
        return [read_batch(self._engine, batch, read) for batch in micro_batches]

    def generating(self) -> Any:
        """Return the sharded model: every rank of a replica has its logits whole. See RewardedEngine."""
        self._engine.eval()
        return self._engine.module

    def tracked(self, with_head: bool) -> Tracked:
        """Return the adapted model for scoring. See Engine."""
        module = self._engine.module
        return Tracked(scorable(module, meta_model(self._config.model), with_head), [module])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self.shards, self._placement, self._config, dp_rank=self.dp_rank)

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back, and leave the base model without adapters."""
        module = self._engine.module
        self._engine.destroy()
        remove_wrapped(module, lambda part: part.base_layer if isinstance(part, TensorParallelLoRA) else None)


def load(config: Config) -> nn.Module:
    """Return this rank's shard of the model, as AutoTP has cut it. Collective over the world."""
    sharding = {**deepspeed_config(config), "zero_optimization": {"stage": 0}}
    with loaded_to_be_cut(config.model) as model:
        model.config.use_cache = False
        sharded = initialize(model, {**sharding, "tensor_parallel": {"autotp_size": config.parallel.tp}})
    module = sharded.module
    sharded.destroy()
    return module


ENGINE = StepEngine(AutoTPEngine, load, methods=("sft", "grpo"))
