"""What the DeepSpeed engines share: configuration, optimizer, and the state a checkpoint needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plop_dist.config.schema import Config
from plop_dist.training.adapters.shards import AdapterShard


def deepspeed_config(config: Config, num_micro_batches: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run: ZeRO stage, clipping, micro-batches per step, dtype."""
    train = config.train
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's AdamW under ZeRO 1
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def adamw(parameters: Sequence[Tensor], config: Config) -> torch.optim.AdamW:
    """Return torch's AdamW over the adapter parameters, with the betas and epsilon that TRL uses by default."""
    return torch.optim.AdamW(parameters, lr=config.train.learning_rate, weight_decay=config.train.weight_decay)


def parameters_of(shards: Sequence[AdapterShard]) -> list[Tensor]:
    """Return the adapter parameters in a fixed order: A and B of each adapter."""
    return [parameter for shard in shards for parameter in (shard.A, shard.B)]


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the learning rate of the engine's optimizer."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def engine_state(engine: Any, shards: Sequence[AdapterShard]) -> dict[str, Any]:
    """Return this rank's adapter parameters, float32 partitions (ZeRO 1) and optimizer state."""
    partitions = getattr(engine.optimizer, "single_partition_of_fp32_groups", ())
    return {
        "adapters": [parameter.detach().cpu() for parameter in parameters_of(shards)],
        "partitions": [partition.detach().cpu() for partition in partitions],
        "optimizer": _inner(engine).state_dict(),
    }


def load_engine_state(engine: Any, shards: Sequence[AdapterShard], state: dict[str, Any]) -> None:
    """Put back what engine_state returned, in place."""
    with torch.no_grad():
        for parameter, saved in zip(parameters_of(shards), state["adapters"], strict=True):
            parameter.copy_(saved)
        partitions = getattr(engine.optimizer, "single_partition_of_fp32_groups", ())
        for partition, saved in zip(partitions, state["partitions"], strict=True):
            partition.copy_(saved)
    _inner(engine).load_state_dict(state["optimizer"])


def local_grad_norm(shards: Sequence[AdapterShard], group: dist.ProcessGroup | None) -> float:
    """Return the gradient's norm over all of the group's ranks; whole parameters count once.

    group: the tensor-parallel group. Collective over it.
    """
    first = group is None or dist.get_rank(group) == 0
    total = 0.0
    for shard in shards:
        for parameter, dim in ((shard.A, shard.A_dim), (shard.B, shard.B_dim)):
            if parameter.grad is not None and (dim is not None or first):
                total += float(parameter.grad.float().square().sum(dtype=torch.float64))
    if group is None:
        return total**0.5
    summed = torch.tensor(total, dtype=torch.float64, device=shards[0].A.device if shards else None)
    dist.all_reduce(summed, group=group)
    return float(summed) ** 0.5


def _inner(engine: Any) -> Any:
    # DeepSpeed's ZeRO optimizer keeps torch's inside; without ZeRO the engine holds torch's itself.
    optimizer = engine.optimizer
    return optimizer.optimizer if hasattr(optimizer, "single_partition_of_fp32_groups") else optimizer
