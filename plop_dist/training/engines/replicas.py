"""Training in whole replicas, step by step: one process, data-parallel ranks, DeepSpeed's ZeRO at any stage.

`run` trains these layouts with TRL, which brings a loop of its own, but for GRPO in one process or plain data
parallelism with train.engine plop; comparisons drive the steps themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.backends.hf.load import load_model, meta_model
from plop_dist.backends.hf.model import pick_device
from plop_dist.backends.hf.whole import whole_model
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import check_complete, lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.shards import peft_shards, remove_peft
from plop_dist.training.batch import Batch, batch_loss, read_batch, row_losses
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.deepspeed import DeepSpeedOptimizer, training_engine
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.training.logits import Objective, Read
from plop_dist.training.loop import StepEngine
from plop_dist.training.sums import grad_norm
from plop_dist.values.placement import Placement


class ReplicaEngine:
    """An Engine over PEFT's layers in a whole model on every rank."""

    def __init__(self, config: Config, placement: Placement, base: nn.Module | None = None):
        from peft import get_peft_model

        shared = next((one for one in placement.chosen if one.storage not in ("linear", "conv1d")), None)
        if shared is not None:
            raise ConfigError(
                f"'{shared.fqn}' is a part of '{shared.holder}', whose adapters are not trained step by step; leave it "
                "out (placement.experts=false, placement.exclude)."
            )
        self._config, self._placement = config, placement
        self._base: Any = load(config) if base is None else base
        self._model: Any = get_peft_model(self._base, lora_config(placement, config))
        self.shards = peft_shards(self._model)
        check_complete([shard.fqn for shard in self.shards], placement)
        set_initial(self.shards, config.train.seed)
        self.dp_group: dist.ProcessGroup | None = dist.group.WORLD if dist.is_initialized() else None
        self.dp_rank, self.dp_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = next(self._base.parameters()).device
        self._engine: Any = None
        self.optimizer: AdapterOptimizer | DeepSpeedOptimizer
        if config.parallel.backend == "deepspeed" and dist.is_initialized():
            self._engine, self.optimizer = training_engine(self._model, self.shards, config)
        else:
            self.optimizer = AdapterOptimizer(self.shards, config.train, self.dp_group)

    def step(
        self,
        micro_batches: Sequence[Batch],
        num_targets: int,
        learning_rate: float,
        objective: Objective | None = None,
    ) -> tuple[float, float]:
        """Run one optimizer step. See Engine."""
        if self._engine is not None:
            return self._deepspeed_step(micro_batches, num_targets, learning_rate, objective)
        assert isinstance(self.optimizer, AdapterOptimizer)
        self._model.train()
        total = 0.0
        for batch in micro_batches:
            loss = batch_loss(self._model, batch, objective)
            (loss / num_targets).backward()
            total += float(loss.detach())
        return total, self.optimizer.step(learning_rate, self.device)

    def row_losses(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Return each row's loss without gradients. See Engine."""
        return row_losses(self._evaluated(), micro_batches)

    @torch.no_grad()
    def read_logits(self, micro_batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """Return what is read of each micro-batch's logits. See RewardedEngine."""
        model = self._evaluated()
        return [read_batch(model, batch, read) for batch in micro_batches]

    def generating(self) -> Any:
        """Return the model, which generates by itself; not where its weights are partitioned. See RewardedEngine."""
        if self._engine is not None:
            return None
        return self._evaluated()

    def tracked(self, with_head: bool) -> Tracked:
        """Return the model as it trains for scoring. See Engine."""
        return Tracked(whole_model(self._base, with_head, twin=meta_model(self._config.model)), [self._base])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self.shards, self._placement, self._config, dp_rank=self.dp_rank)

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back, and leave the base model without adapters."""
        if self._engine is not None:
            self._engine.destroy()
        remove_peft(self._base)

    def _evaluated(self) -> Any:
        model = self._model if self._engine is None else self._engine
        model.eval()
        return model

    def _deepspeed_step(
        self, micro_batches: Sequence[Batch], num_targets: int, learning_rate: float, objective: Objective | None
    ) -> tuple[float, float]:
        assert isinstance(self.optimizer, DeepSpeedOptimizer)
        self.optimizer.set_learning_rate(learning_rate)
        self._engine.train()
        total = norm = 0.0
        # DeepSpeed averages over micro-batches and replicas; the loss is a mean over tokens.
        scale = len(micro_batches) * self.dp_size / num_targets
        stage = self._config.parallel.zero_stage
        for batch in micro_batches:
            loss = batch_loss(self._engine, batch, objective)
            total += float(loss.detach())
            self._engine.backward(loss * scale)
            if not stage and self._engine.is_gradient_accumulation_boundary():
                norm = grad_norm(self.shards, self.device)  # in float32 without ZeRO DeepSpeed keeps none
            self._engine.step()
        return total, float(self._engine.get_global_grad_norm()) if stage else norm


def load(config: Config) -> nn.Module:
    """Return the model, whole; partitioned at ZeRO-3. Collective over the world."""
    if config.parallel.zero_stage == 3 and dist.is_initialized():
        return _partitioned(config)
    model: Any = load_model(config.model)
    model.config.use_cache = False
    return model.to(pick_device())


def _partitioned(config: Config) -> nn.Module:
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from plop_dist.training.engines.deepspeed import deepspeed_config

    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    pick_device()
    kept = HfDeepSpeedConfig(deepspeed_config(config))  # as long as it lives, models come partitioned
    model: Any = load_model(config.model)
    del kept
    model.config.use_cache = False
    return model


ENGINE = StepEngine(ReplicaEngine, load, methods=("sft", "grpo"))
