"""Training with transformers' own tensor parallelism and PEFT, times data parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from plop_dist.backends.hf.load import load_model, meta_model
from plop_dist.backends.hf.tp_plan import scorable
from plop_dist.config.schema import Config
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import check_complete, lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.shards import remove_peft
from plop_dist.training.adapters.tp_plan import add_planned, planned_shards
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.training.engines.whole_model import WholeModelEngine
from plop_dist.training.loop import StepEngine
from plop_dist.values.placement import Placement

Base = tuple[nn.Module, DeviceMesh]


class HFTensorParallelEngine(WholeModelEngine):
    """An Engine over a transformers model loaded with tp_plan="auto"."""

    def __init__(self, config: Config, placement: Placement, base: Base | None = None):
        self._config, self._placement = config, placement
        self._base, mesh = base or load(config)
        self._tp_group = mesh["tp"].get_group()
        self.dp_group: dist.ProcessGroup | None = mesh["dp"].get_group()
        self.dp_rank, self.dp_size = mesh["dp"].get_local_rank(), config.parallel.dp
        self.device = next(self._base.parameters()).device
        self._trained = add_planned(self._base, lora_config(placement, config))
        self.shards = planned_shards(self._trained, self._tp_group)
        check_complete({shard.fqn for shard in self.shards}, placement)
        set_initial(self.shards, config.train.seed)
        self.optimizer = AdapterOptimizer(self.shards, config.train, self.dp_group)

    def generating(self) -> Any:
        """Return the model: every rank of a replica has its logits whole. See RewardedEngine."""
        self._trained.eval()
        return self._trained

    def tracked(self, with_head: bool) -> Tracked:
        """Return the adapted model for scoring. See Engine."""
        base = self._trained.get_base_model()
        model = scorable(base, meta_model(self._config.model), self._tp_group, with_head)
        return Tracked(model, [base])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self.shards, self._placement, self._config, dp_rank=self.dp_rank)

    def close(self) -> None:
        """Leave the base model without adapters."""
        remove_peft(self._base)


def load(config: Config) -> Base:
    """Return this rank's shard of the model, and the mesh. Collective over the world."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device_type, (config.parallel.dp, config.parallel.tp), mesh_dim_names=("dp", "tp"))
    return load_model(config.model, tp_plan="auto", device_mesh=mesh), mesh


ENGINE = StepEngine(HFTensorParallelEngine, load, methods=("sft", "grpo"))
