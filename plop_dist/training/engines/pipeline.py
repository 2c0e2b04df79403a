"""Training in DeepSpeed's PipelineModule, times data parallelism: PEFT adapters in the layers of each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.backends.deepspeed.pipeline import PipelineModel, load_stage
from plop_dist.backends.deepspeed.stack import pipeline_layers
from plop_dist.backends.hf.load import load_tokenizer, meta_model
from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError
from plop_dist.training import loop
from plop_dist.training.adapters.initial import reset_peft_adapter
from plop_dist.training.adapters.shards import check_complete, lora_config, peft_shards, save_peft_adapter
from plop_dist.training.engines.deepspeed import (
    adamw,
    deepspeed_config,
    engine_state,
    load_engine_state,
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
    """Train the adapters of a model cut into pipeline stages; see loop.run for what it returns and writes.

    `data` replaces the configured training rows. Collective over all ranks. Raises ModelError for a model that is not
    a plain stack of decoder layers, LayoutError for a stage without adapters.
    """
    if data is None:
        from plop_dist.training.data import TrainingData

        data = TrainingData(config, load_tokenizer(config.model))
    engine = PipelineEngine(config, placement)
    try:
        return loop.run(engine, data, config, placement, log)
    finally:
        engine.close()


class PipelineEngine:
    """loop.Engine over deepspeed.pipe.PipelineModule."""

    def __init__(self, config: Config, placement: Placement):
        import deepspeed
        from deepspeed.pipe import PipelineModule
        from peft import inject_adapter_in_model

        self._config, self._placement = config, placement
        model, options = load_stage(config)
        layers = pipeline_layers(model)
        modules = dict(model.named_modules())
        here = [fqn for fqn in placement.modules if not isinstance(modules.get(fqn, nn.Identity()), nn.Identity)]
        self._check_stages(here)
        model.requires_grad_(False)
        peft_config = lora_config(placement, config)
        peft_config.target_modules = set(here)  # PEFT would adapt what stands in for another stage's head
        inject_adapter_in_model(peft_config, model)
        reset_peft_adapter(model, config.train.seed)
        self._shards = peft_shards(model)
        parameters = parameters_of(self._shards)
        for parameter in parameters:
            # DeepSpeed's ZeRO norm counts unmarked parameters on the first stage alone.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        self._total, self._scale = 0.0, 1.0
        pipe = PipelineModule(
            layers=layers, loss_fn=self._loss, activation_checkpoint_interval=0, dynamic_shape=True, **options
        )
        self._pipe = pipe
        self._engine = deepspeed.initialize(
            model=pipe,
            config=deepspeed_config(config, config.train.gradient_accumulation_steps),
            optimizer=adamw(parameters, config),
            model_parameters=parameters,
        )[0]
        self._engine.clip_fp32_gradients = self._clip  # DeepSpeed's own does not keep the norm, and misses later stages
        grid = self._engine.grid
        self._pp_group, self.dp_group = grid.get_pipe_parallel_group(), grid.get_data_parallel_group()
        self.dp_rank, self.dp_size = grid.get_data_parallel_rank(), config.parallel.dp
        self.device = self._engine.device

    def step(self, micro_batches: Sequence[loop.Batch], num_targets: int, learning_rate: float) -> tuple[float, float]:
        """Run one optimizer step through DeepSpeed's 1F1B schedule. See loop.Engine."""
        set_learning_rate(self._engine, learning_rate)
        # DeepSpeed averages over micro-batches and replicas; the loss is a mean over tokens.
        self._total, self._scale = 0.0, len(micro_batches) * self.dp_size / num_targets
        self._engine.train_batch(iter([_as_pipe_input(batch) for batch in micro_batches]))
        if self._config.parallel.zero_stage:
            self._grad_norm = float(self._engine.get_global_grad_norm())
        total = loop.sum_over(self._pp_group, self._total, device=self.device)[0]
        return loop.sum_over(self.dp_group, total, device=self.device)[0] / num_targets, self._grad_norm

    def sum_loss(self, micro_batches: Sequence[loop.Batch]) -> float:
        """Return the summed loss without gradients. See loop.Engine."""
        self._total, self._scale = 0.0, 1.0
        self._engine.eval_batch(
            iter([_as_pipe_input(batch) for batch in micro_batches]),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=len(micro_batches),
        )
        self._engine.fwd_outputs = []
        return loop.sum_over(self._pp_group, self._total, device=self.device)[0]

    def state(self) -> dict[str, Any]:
        """Return this rank's adapter and optimizer state."""
        return engine_state(self._engine, self._shards)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what state() returned."""
        load_engine_state(self._engine, self._shards, state)

    def tracked(self, with_head: bool) -> loop.Tracked:
        """Return the adapted stage for scoring. See loop.Engine."""
        grid = self._engine.grid
        model = PipelineModel(list(self._pipe.forward_funcs), grid, meta_model(self._config.model), with_head)
        return loop.Tracked(model, self._shards, [self._pipe])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self._shards, self._placement, self._config, owns=self.dp_rank == 0)

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back."""
        self._engine.destroy()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = loop.sum_token_losses(logits, labels)
        self._total += float(loss.detach())
        return loss * self._scale

    def _clip(self) -> None:
        """Clip by the norm over all stages, and keep it. Collective over the pipeline."""
        grads = [p.grad for p in parameters_of(self._shards) if p.grad is not None]
        square = sum(float(grad.float().square().sum(dtype=torch.float64)) for grad in grads)
        self._grad_norm = loop.sum_over(self._pp_group, square, device=self.device)[0] ** 0.5
        scale = min(1.0, self._config.train.max_grad_norm / (self._grad_norm + 1e-6))
        for grad in grads:
            grad.mul_(scale)

    def _check_stages(self, here: Sequence[str]) -> None:
        """Raise PlacementError or LayoutError unless the stages hold the chosen modules, and each of them some."""
        stages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(stages, list(here))
        check_complete({fqn for stage in stages for fqn in stage}, self._placement)
        if not all(stages):
            raise LayoutError(
                f"parallel.pp is {self._config.parallel.pp}, but rank {stages.index([])}'s stage holds no chosen "
                "module; use a smaller parallel.pp, parallel.tp instead, or placement.granularity=type."
            )


def _as_pipe_input(batch: loop.Batch) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    return (batch["input_ids"], batch["position_ids"], batch["attention_mask"]), batch["labels"]
