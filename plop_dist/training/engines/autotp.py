"""Training under DeepSpeed's AutoTP, with data parallelism and ZeRO 0 or 1 over the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plop_dist.backends.deepspeed.autotp import scorable
from plop_dist.backends.deepspeed.late_dtype import loaded_to_be_cut
from plop_dist.backends.hf.load import meta_model
from plop_dist.config.schema import Config
from plop_dist.training.adapters.placed import lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.shards import remove_wrapped
from plop_dist.training.adapters.tensor_parallel import TensorParallelLoRA, add_adapters
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.deepspeed import deepspeed_config, initialize, training_engine
from plop_dist.training.engines.whole_model import WholeModelEngine
from plop_dist.training.loop import StepEngine
from plop_dist.values.placement import Placement


class AutoTPEngine(WholeModelEngine):
    """An Engine over deepspeed.initialize with tensor_parallel.autotp_size."""

    def __init__(self, config: Config, placement: Placement, base: nn.Module | None = None):
        from deepspeed.utils import groups

        self._config, self._placement = config, placement
        # The adapters are sized by AutoTP's shards, and the optimizer by the adapters: hence two engines in a row.
        module = load(config) if base is None else base
        tp_group: Any = groups.get_tensor_model_parallel_group()
        self.shards = add_adapters(module, placement, lora_config(placement, config), tp_group, seed=config.train.seed)
        self._trained, self.optimizer = training_engine(module, self.shards, config, mpu=groups)
        dp_group: Any = groups.get_data_parallel_group()
        self.dp_group: dist.ProcessGroup | None = dp_group
        self.dp_rank, self.dp_size = dist.get_rank(dp_group), dist.get_world_size(dp_group)
        self.device: torch.device = self._trained.device

    def generating(self) -> Any:
        """Return the sharded model: every rank of a replica has its logits whole. See RewardedEngine."""
        self._trained.eval()
        return self._trained.module

    def tracked(self, with_head: bool) -> Tracked:
        """Return the adapted model for scoring. See Engine."""
        module = self._trained.module
        return Tracked(scorable(module, meta_model(self._config.model), with_head), [module])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self.shards, self._placement, self._config, dp_rank=self.dp_rank)

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back, and leave the base model without adapters."""
        module = self._trained.module
        self._trained.destroy()
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
