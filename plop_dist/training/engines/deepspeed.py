"""What the DeepSpeed engines share: configuration, the engine, and the optimizer with the state a checkpoint needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from plop_dist.config.schema import Config
from plop_dist.training.adapters.shards import AdapterShard, parameters_of


def deepspeed_config(config: Config) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run: ZeRO stage, clipping, micro-batches per step."""
    train = config.train
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's AdamW under ZeRO
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def initialize(model: Any, options: dict[str, Any], **more: Any) -> Any:
    """Return DeepSpeed's engine around a model. Collective over the world."""
    import deepspeed

    return deepspeed.initialize(model=model, config=options, **more)[0]


def training_engine(
    model: Any, shards: Sequence[AdapterShard], config: Config, **more: Any
) -> tuple[Any, DeepSpeedOptimizer]:
    """Return DeepSpeed's engine around a model whose adapters it trains with AdamW, and its optimizer.

    The betas and epsilon are those that TRL uses by default. Collective over the world.
    """
    train, parameters = config.train, parameters_of(shards)
    adamw = torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    engine = initialize(model, deepspeed_config(config), optimizer=adamw, model_parameters=parameters, **more)
    return engine, DeepSpeedOptimizer(engine, shards)


class DeepSpeedOptimizer:
    """The optimizer inside a DeepSpeed engine: its learning rate, and what a checkpoint keeps of it."""

    def __init__(self, engine: Any, shards: Sequence[AdapterShard]) -> None:
        self._optimizer, self._parameters = engine.optimizer, parameters_of(shards)
        # DeepSpeed's ZeRO 1 keeps torch's optimizer inside its own; without ZeRO the engine holds torch's itself.
        self._partitions = getattr(self._optimizer, "single_partition_of_fp32_groups", None)
        self._adamw = self._optimizer if self._partitions is None else self._optimizer.optimizer

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def state(self) -> dict[str, Any]:
        """Return this rank's adapter parameters, float32 partitions (ZeRO 1) and optimizer state."""
        return {
            "adapters": [parameter.detach().cpu() for parameter in self._parameters],
            "partitions": [partition.detach().cpu() for partition in self._partitions or ()],
            "optimizer": self._adamw.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what state() returned, in place."""
        for parameter, saved in zip(self._parameters, state["adapters"], strict=True):
            parameter.copy_(saved)
        for partition, saved in zip(self._partitions or (), state["partitions"], strict=True):
            partition.copy_(saved)
        self._adamw.load_state_dict(state["optimizer"])
