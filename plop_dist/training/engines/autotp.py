"""Training under DeepSpeed's AutoTP, with data parallelism and ZeRO 0 or 1 over the adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plop_dist.backends.deepspeed.autotp import scorable
from plop_dist.backends.hf.load import load_model, load_tokenizer, meta_model
from plop_dist.config.schema import Config
from plop_dist.training import loop
from plop_dist.training.adapters.shards import save_peft_adapter
from plop_dist.training.adapters.tensor_parallel import add_adapters
from plop_dist.training.engines.deepspeed import (
    adamw,
    deepspeed_config,
    engine_state,
    load_engine_state,
    local_grad_norm,
    parameters_of,
    set_learning_rate,
)
from plop_dist.values.placement import Placement


def train(
    config: Config,
    placement: Placement,
    log: Callable[[dict[str, Any]], None],
    data: loop.Data | None = None,
) -> dict[str, Any]:
    """Train the adapters of a model sharded by AutoTP; see loop.run for what it returns and writes.

    `data` replaces the configured training rows. Collective over all ranks.
    """
    if data is None:
        from plop_dist.training.data import TrainingData

        data = TrainingData(config, load_tokenizer(config.model))
    engine = AutoTPEngine(config, placement)
    try:
        return loop.run(engine, data, config, placement, log)
    finally:
        engine.close()


class AutoTPEngine:
    """loop.Engine over deepspeed.initialize with tensor_parallel.autotp_size."""

    def __init__(self, config: Config, placement: Placement):
        import deepspeed
        from deepspeed.utils import groups

        self._config, self._placement = config, placement
        model = load_model(config.model)
        model.config.use_cache = False
        options = deepspeed_config(config, config.train.gradient_accumulation_steps)
        # The adapters are sized by AutoTP's shards, and the optimizer by the adapters: hence two engines in a row.
        sharding = {**options, "zero_optimization": {"stage": 0}}
        sharding["tensor_parallel"] = {"autotp_size": config.parallel.tp}
        sharded = deepspeed.initialize(model=model, config=sharding)[0]
        model = sharded.module
        self._shards = add_adapters(model, placement, config.train)
        sharded.destroy()
        parameters = parameters_of(self._shards)
        self._engine = deepspeed.initialize(
            model=model, config=options, optimizer=adamw(parameters, config), model_parameters=parameters, mpu=groups
        )[0]
        self._tp_group = groups.get_tensor_model_parallel_group()
        self.dp_group = groups.get_data_parallel_group()
        self.dp_rank, self.dp_size = dist.get_rank(self.dp_group), dist.get_world_size(self.dp_group)
        self.device = self._engine.device

    def step(self, micro_batches: Sequence[loop.Batch], num_targets: int, learning_rate: float) -> tuple[float, float]:
        """Run one optimizer step. See loop.Engine."""
        set_learning_rate(self._engine, learning_rate)
        self._engine.train()
        total = 0.0
        # DeepSpeed averages over micro-batches and replicas; the loss is a mean over tokens.
        scale = len(micro_batches) * self.dp_size / num_targets
        for batch in micro_batches:
            loss = self._loss(batch)
            total += float(loss.detach())
            self._engine.backward(loss * scale)
            if self._engine.is_gradient_accumulation_boundary() and not self._config.parallel.zero_stage:
                grad_norm = local_grad_norm(self._shards, self._tp_group)
            self._engine.step()
        if self._config.parallel.zero_stage:
            grad_norm = float(self._engine.get_global_grad_norm())
        return loop.sum_over(self.dp_group, total, device=self.device)[0] / num_targets, grad_norm

    @torch.no_grad()
    def sum_loss(self, micro_batches: Sequence[loop.Batch]) -> float:
        """Return the summed loss without gradients. See loop.Engine."""
        self._engine.eval()
        return sum(float(self._loss(batch)) for batch in micro_batches)

    def state(self) -> dict[str, Any]:
        """Return this rank's adapter and optimizer state."""
        return engine_state(self._engine, self._shards)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what state() returned."""
        load_engine_state(self._engine, self._shards, state)

    def tracked(self, with_head: bool) -> loop.Tracked:
        """Return the adapted model for scoring. See loop.Engine."""
        module = self._engine.module
        model = scorable(module, meta_model(self._config.model), with_head)
        return loop.Tracked(model, self._shards, [module])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        owns = self.dp_rank == 0 and dist.get_rank(self._tp_group) == 0
        save_peft_adapter(directory, self._shards, self._placement, self._config, owns=owns)

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back."""
        self._engine.destroy()

    def _loss(self, batch: loop.Batch) -> torch.Tensor:
        logits = self._engine(**loop.model_inputs(batch)).logits
        return loop.sum_token_losses(logits, batch["labels"])
