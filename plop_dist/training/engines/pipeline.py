"""Training in DeepSpeed's PipelineModule, times data parallelism: PEFT adapters in the layers of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plop_dist.backends.deepspeed.pipeline import PipelineModel, load_stage
from plop_dist.backends.deepspeed.stack import pipeline_layers
from plop_dist.backends.hf.load import meta_model
from plop_dist.config.schema import Config
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.stages import add_stage_adapters, clip_over_stages
from plop_dist.training.batch import Batch, sum_token_losses
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.deepspeed import training_engine
from plop_dist.training.loop import StepEngine
from plop_dist.training.sums import sum_over
from plop_dist.values.placement import Placement


class PipelineEngine:
    """An Engine over deepspeed.pipe.PipelineModule."""

    def __init__(self, config: Config, placement: Placement):
        from deepspeed.pipe import PipelineModule

        self._config, self._placement = config, placement
        model, options = load_stage(config)
        layers = pipeline_layers(model)
        self.shards = add_stage_adapters(model, placement, lora_config(placement, config))
        set_initial(self.shards, config.train.seed)
        self._total, self._scale, self._grad_norm = 0.0, 1.0, 0.0
        self._pipe = PipelineModule(
            layers=layers, loss_fn=self._loss, activation_checkpoint_interval=0, dynamic_shape=True, **options
        )
        self._engine, self.optimizer = training_engine(self._pipe, self.shards, config)
        clip_over_stages(self._engine, self.shards, config.train.max_grad_norm, self._note_norm)
        grid = self._engine.grid
        self._pp_group: dist.ProcessGroup = grid.get_pipe_parallel_group()
        self.dp_group: dist.ProcessGroup | None = grid.get_data_parallel_group()
        self.dp_rank, self.dp_size = grid.get_data_parallel_rank(), config.parallel.dp
        self.device: torch.device = self._engine.device

    def step(self, micro_batches: Sequence[Batch], num_targets: int, learning_rate: float) -> tuple[float, float]:
        """Run one optimizer step through DeepSpeed's 1F1B schedule. See Engine."""
        self.optimizer.set_learning_rate(learning_rate)
        # DeepSpeed averages over micro-batches and replicas; the loss is a mean over tokens.
        self._total, self._scale = 0.0, len(micro_batches) * self.dp_size / num_targets
        self._engine.train_batch(iter([_as_pipe_input(batch) for batch in micro_batches]))
        if self._config.parallel.zero_stage:
            self._grad_norm = float(self._engine.get_global_grad_norm())
        return sum_over(self._pp_group, self._total, device=self.device)[0], self._grad_norm

    def sum_loss(self, micro_batches: Sequence[Batch]) -> float:
        """Return the summed loss without gradients. See Engine."""
        self._total, self._scale = 0.0, 1.0
        self._engine.eval_batch(
            iter([_as_pipe_input(batch) for batch in micro_batches]),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=len(micro_batches),
        )
        self._engine.fwd_outputs = []
        return sum_over(self._pp_group, self._total, device=self.device)[0]

    def tracked(self, with_head: bool) -> Tracked:
        """Return the adapted stage for scoring. See Engine."""
        layers: list[Any] = list(self._pipe.forward_funcs)
        model = PipelineModel(layers, self._engine.grid, meta_model(self._config.model), with_head)
        return Tracked(model, [self._pipe])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self.shards, self._placement, self._config, dp_rank=self.dp_rank)

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back."""
        self._engine.destroy()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = sum_token_losses(logits, labels)
        self._total += float(loss.detach())
        return loss * self._scale

    def _note_norm(self, norm: float) -> None:
        self._grad_norm = norm


def _as_pipe_input(batch: Batch) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    return (batch["input_ids"], batch["position_ids"], batch["attention_mask"]), batch["labels"]


ENGINE = StepEngine(PipelineEngine)
