"""Training with transformers' own tensor parallelism and PEFT, times data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from plop_dist.backends.hf.load import load_model, load_tokenizer, meta_model
from plop_dist.backends.hf.tp_plan import scorable
from plop_dist.config.schema import Config
from plop_dist.errors import PlacementError
from plop_dist.training import loop
from plop_dist.training.adapters.initial import initial_adapter
from plop_dist.training.adapters.shards import AdapterShard, check_complete, lora_config, save_peft_adapter
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.values.placement import Placement

_ADAPTER = "default"


def train(
    config: Config,
    placement: Placement,
    log: Callable[[dict[str, Any]], None],
    data: loop.Data | None = None,
) -> dict[str, Any]:
    """Train the adapters of a model sharded by its tp_plan; see loop.run for what it returns and writes.

    `data` replaces the configured training rows. Collective over all ranks.
    """
    if data is None:
        from plop_dist.training.data import TrainingData

        data = TrainingData(config, load_tokenizer(config.model))
    return loop.run(HFTensorParallelEngine(config, placement), data, config, placement, log)


class HFTensorParallelEngine:
    """loop.Engine over a transformers model loaded with tp_plan="auto"."""

    def __init__(self, config: Config, placement: Placement):
        self._config, self._placement = config, placement
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(device_type, (config.parallel.dp, config.parallel.tp), mesh_dim_names=("dp", "tp"))
        self._tp_group, self.dp_group = mesh["tp"].get_group(), mesh["dp"].get_group()
        self.dp_rank, self.dp_size = mesh["dp"].get_local_rank(), config.parallel.dp
        model = load_model(config.model, tp_plan="auto", device_mesh=mesh)
        self.device = next(model.parameters()).device
        self._model = _adapted(model, config, placement)
        self._shards = _shards(self._model, self._tp_group, config.train.seed)
        check_complete({shard.fqn for shard in self._shards}, placement)
        self._optimizer = AdapterOptimizer(self._shards, config.train, self.dp_group)

    def step(self, micro_batches: Sequence[loop.Batch], num_targets: int, learning_rate: float) -> tuple[float, float]:
        """Run one optimizer step. See loop.Engine."""
        self._model.train()
        total = 0.0
        for batch in micro_batches:
            loss = self._loss(batch)
            (loss / num_targets).backward()
            total += float(loss.detach())
        grad_norm = self._optimizer.step(learning_rate, self.device)
        return loop.sum_over(self.dp_group, total, device=self.device)[0] / num_targets, grad_norm

    @torch.no_grad()
    def sum_loss(self, micro_batches: Sequence[loop.Batch]) -> float:
        """Return the summed loss without gradients. See loop.Engine."""
        self._model.eval()
        return sum(float(self._loss(batch)) for batch in micro_batches)

    def state(self) -> dict[str, Any]:
        """Return this rank's adapter and optimizer state."""
        return self._optimizer.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what state() returned."""
        self._optimizer.load_state(state)

    def tracked(self, with_head: bool) -> loop.Tracked:
        """Return the adapted model for scoring. See loop.Engine."""
        base = self._model.get_base_model()
        model = scorable(base, meta_model(self._config.model), self._tp_group, with_head)
        return loop.Tracked(model, self._shards, [base])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        owns = self.dp_rank == 0 and dist.get_rank(self._tp_group) == 0
        save_peft_adapter(directory, self._shards, self._placement, self._config, owns=owns)

    def _loss(self, batch: loop.Batch) -> torch.Tensor:
        return loop.sum_token_losses(self._model(**loop.model_inputs(batch)).logits, batch["labels"])


def _adapted(model: nn.Module, config: Config, placement: Placement) -> nn.Module:
    from peft import get_peft_model

    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "_hf_tp_plan"):
            # transformers 5.12.1 divides out_features once for the weight and once more for the bias.
            module.out_features, module.in_features = module.weight.shape
    adapted = get_peft_model(model, lora_config(placement, config))
    for _, module in _lora_layers(adapted):
        for part in (module.lora_A[_ADAPTER], module.lora_B[_ADAPTER]):
            # PEFT 0.21.2 leaves the global in_features on a row-parallel A and then refuses its own input.
            part.out_features, part.in_features = part.weight.shape
    return adapted


def _shards(model: nn.Module, tp_group: dist.ProcessGroup, seed: int) -> list[AdapterShard]:
    """Return the adapters by the plan of their base linears, set to this rank's part of the initial adapter."""
    layers = list(_lora_layers(model))
    mine = [(m.lora_A[_ADAPTER].weight.shape[1], m.lora_B[_ADAPTER].weight.shape[0]) for _, m in layers]
    shapes: list[Any] = [None] * dist.get_world_size(tp_group)
    dist.all_gather_object(shapes, mine, group=tp_group)
    shards = []
    for index, (fqn, module) in enumerate(layers):
        plan = getattr(module.get_base_layer(), "_hf_tp_plan", None)
        if plan not in ("colwise", "rowwise", None):
            raise PlacementError(
                f"'{fqn}' is sharded by transformers' plan '{plan}', for which PEFT shards no adapter; exclude it with "
                "placement.exclude, or train with another parallel.backend."
            )
        A_dim, B_dim = (1 if plan == "rowwise" else None), (0 if plan == "colwise" else None)
        sizes = tuple(shape[index][0 if plan == "rowwise" else 1] for shape in shapes)
        shard = AdapterShard(
            fqn, module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight, A_dim, B_dim, sizes, tp_group
        )
        _set_initial(shard, seed)
        shards.append(shard)
    return shards


@torch.no_grad()
def _set_initial(shard: AdapterShard, seed: int) -> None:
    sizes, own = shard.sizes or (), dist.get_rank(shard.group)
    in_features = sum(sizes) if shard.A_dim == 1 else shard.A.shape[1]
    A, B = initial_adapter(shard.fqn, in_features, shard.B.shape[0], shard.A.shape[0], seed)
    shard.A.copy_(A.split(sizes, dim=1)[own] if shard.A_dim == 1 else A)
    shard.B.copy_(B)


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (path.removeprefix("base_model.model."), module)
        for path, module in model.named_modules()
        if _ADAPTER in getattr(module, "lora_A", {})
    ]
