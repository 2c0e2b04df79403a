"""Training with transformers' own tensor parallelism and PEFT, times data parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from plop_dist.backends.hf.load import load_model, meta_model
from plop_dist.backends.hf.tp_plan import scorable
from plop_dist.config.schema import Config
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import check_complete, lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.tp_plan import add_planned, planned_shards
from plop_dist.training.batch import Batch, batch_loss
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.training.loop import StepEngine
from plop_dist.values.placement import Placement


class HFTensorParallelEngine:
    """An Engine over a transformers model loaded with tp_plan="auto"."""

    def __init__(self, config: Config, placement: Placement):
        self._config, self._placement = config, placement
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(device_type, (config.parallel.dp, config.parallel.tp), mesh_dim_names=("dp", "tp"))
        self._tp_group = mesh["tp"].get_group()
        self.dp_group: dist.ProcessGroup | None = mesh["dp"].get_group()
        self.dp_rank, self.dp_size = mesh["dp"].get_local_rank(), config.parallel.dp
        model = load_model(config.model, tp_plan="auto", device_mesh=mesh)
        self.device = next(model.parameters()).device
        self._model = add_planned(model, lora_config(placement, config))
        self.shards = planned_shards(self._model, self._tp_group)
        check_complete({shard.fqn for shard in self.shards}, placement)
        set_initial(self.shards, config.train.seed)
        self.optimizer = AdapterOptimizer(self.shards, config.train, self.dp_group)

    def step(self, micro_batches: Sequence[Batch], num_targets: int, learning_rate: float) -> tuple[float, float]:
        """Run one optimizer step. See Engine."""
        self._model.train()
        total = 0.0
        for batch in micro_batches:
            loss = batch_loss(self._model, batch)
            (loss / num_targets).backward()
            total += float(loss.detach())
        return total, self.optimizer.step(learning_rate, self.device)

    @torch.no_grad()
    def sum_loss(self, micro_batches: Sequence[Batch]) -> float:
        """Return the summed loss without gradients. See Engine."""
        self._model.eval()
        return sum(float(batch_loss(self._model, batch)) for batch in micro_batches)

    def tracked(self, with_head: bool) -> Tracked:
        """Return the adapted model for scoring. See Engine."""
        base = self._model.get_base_model()
        model = scorable(base, meta_model(self._config.model), self._tp_group, with_head)
        return Tracked(model, [base])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self.shards, self._placement, self._config, dp_rank=self.dp_rank)

    def close(self) -> None:
        """Give back nothing: there is no engine besides the model."""


ENGINE = StepEngine(HFTensorParallelEngine)
