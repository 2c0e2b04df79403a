"""Training with transformers' own tensor parallelism and PEFT, times data parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from plop_dist.backends.hf.load import load_model, meta_model
from plop_dist.backends.hf.tp_plan import scorable
from plop_dist.config.schema import Config
from plop_dist.errors import PlacementError
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import check_complete, lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.shards import AdapterShard, gather_lengths, lora_layers, remove_peft
from plop_dist.training.batch import Batch, batch_loss, read_batch, row_losses
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.training.logits import Objective, Read
from plop_dist.training.loop import StepEngine
from plop_dist.values.placement import Placement

_ADAPTER = "default"

Base = tuple[nn.Module, DeviceMesh]


class HFTensorParallelEngine:
    """An Engine over a transformers model loaded with tp_plan="auto"."""

    def __init__(self, config: Config, placement: Placement, base: Base | None = None):
        self._config, self._placement = config, placement
        self._base, mesh = base or load(config)
        self._tp_group = mesh["tp"].get_group()
        self.dp_group: dist.ProcessGroup | None = mesh["dp"].get_group()
        self.dp_rank, self.dp_size = mesh["dp"].get_local_rank(), config.parallel.dp
        self.device = next(self._base.parameters()).device
        self._model = _adapted(self._base, config, placement)
        self.shards = _shards(self._model, self._tp_group)
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

    def row_losses(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Return each row's loss without gradients. See Engine."""
        self._model.eval()
        return row_losses(self._model, micro_batches)

    @torch.no_grad()
    def read_logits(self, micro_batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """Return what is read of each micro-batch's logits. See RewardedEngine."""
        self._model.eval()
        return [read_batch(self._model, batch, read) for batch in micro_batches]

    def generating(self) -> Any:
        """Return the model: every rank of a replica has its logits whole. See RewardedEngine."""
        self._model.eval()
        return self._model

    def tracked(self, with_head: bool) -> Tracked:
        """Return the adapted model for scoring. See Engine."""
        base = self._model.get_base_model()
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


def _adapted(model: nn.Module, config: Config, placement: Placement) -> Any:
    """Return the model wrapped by PEFT, its linears and adapters sized by what of them lies on this rank."""
    from peft import get_peft_model

    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "_hf_tp_plan"):
            # transformers 5.12.1 divides out_features once for the weight and once more for the bias.
            module.out_features, module.in_features = module.weight.shape
    wrapped: Any = model  # PEFT asks for transformers' class, of which load_model knows nothing
    adapted = get_peft_model(wrapped, lora_config(placement, config))
    for _, layer in lora_layers(adapted):
        for part in (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]):
            # PEFT 0.21.2 leaves the global in_features on a row-parallel A and then refuses its own input.
            part.out_features, part.in_features = part.weight.shape
    return adapted


def _shards(model: nn.Module, tp_group: dist.ProcessGroup) -> list[AdapterShard]:
    """Return the adapters with the layout that the plan of their base linears gives them. Collective over tp_group.

    Raises PlacementError for a plan under which PEFT shards no adapter.
    """
    layers = list(lora_layers(model))
    plans = [_plan(fqn, layer) for fqn, layer in layers]
    parts = [(layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight) for _, layer in layers]
    local = [A.shape[1] if plan == "rowwise" else B.shape[0] for (A, B), plan in zip(parts, plans, strict=True)]
    return [
        AdapterShard(fqn, A, B, 1 if plan == "rowwise" else None, 0 if plan == "colwise" else None, sizes, tp_group)
        for (fqn, _), (A, B), plan, sizes in zip(layers, parts, plans, gather_lengths(local, tp_group), strict=True)
    ]


def _plan(fqn: str, layer: Any) -> str | None:
    plan = getattr(layer.get_base_layer(), "_hf_tp_plan", None)
    if plan not in ("colwise", "rowwise", None):
        raise PlacementError(
            f"'{fqn}' is sharded by transformers' plan '{plan}', for which PEFT shards no adapter; exclude it with "
            "placement.exclude, or train with another parallel.backend."
        )
    return plan


ENGINE = StepEngine(HFTensorParallelEngine, load, methods=("sft", "grpo"))
