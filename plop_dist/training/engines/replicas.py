"""Training in whole replicas, step by step: one process, data-parallel ranks, DeepSpeed's ZeRO at any stage.

`run` trains these layouts with TRL, which brings a loop of its own, but for GRPO in one process or plain data
parallelism with train.engine plop; comparisons drive the steps themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from plop_dist.backends.hf.load import load_model, meta_model
from plop_dist.backends.hf.model import pick_device
from plop_dist.backends.hf.whole import whole_model
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import check_complete, lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.shards import peft_shards, remove_peft
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.deepspeed import DeepSpeedOptimizer, training_engine
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.training.engines.whole_model import WholeModelEngine
from plop_dist.training.loop import StepEngine
from plop_dist.values.placement import Placement


class ReplicaEngine(WholeModelEngine):
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
        self._trained: Any = get_peft_model(self._base, lora_config(placement, config))
        self.shards = peft_shards(self._trained)
        check_complete([shard.fqn for shard in self.shards], placement)
        set_initial(self.shards, config.train.seed)
        self.dp_group: dist.ProcessGroup | None = dist.group.WORLD if dist.is_initialized() else None
        self.dp_rank, self.dp_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = next(self._base.parameters()).device
        if config.parallel.backend == "deepspeed" and dist.is_initialized():
            self._trained, self.optimizer = training_engine(self._trained, self.shards, config)
        else:
            self.optimizer = AdapterOptimizer(self.shards, config.train, self.dp_group)

    def generating(self) -> Any:
        """Return the model, which generates by itself; not where its weights are partitioned. See RewardedEngine."""
        if isinstance(self.optimizer, DeepSpeedOptimizer):
            return None
        self._trained.eval()
        return self._trained

    def tracked(self, with_head: bool) -> Tracked:
        """Return the model as it trains for scoring. See Engine."""
        return Tracked(whole_model(self._base, with_head, twin=meta_model(self._config.model)), [self._base])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self.shards, self._placement, self._config, dp_rank=self.dp_rank)

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back, and leave the base model without adapters."""
        if isinstance(self.optimizer, DeepSpeedOptimizer):
            self._trained.destroy()
        remove_peft(self._base)


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
