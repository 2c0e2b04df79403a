"""Training in DeepSpeed's PipelineModule, times data parallelism: PEFT adapters in the layers of each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.backends.deepspeed.pipeline import PipelineModel, load_stage
from plop_dist.backends.deepspeed.stack import pipeline_layers
from plop_dist.backends.hf.load import meta_model
from plop_dist.config.schema import Config
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.shards import remove_peft
from plop_dist.training.adapters.stages import add_stage_adapters, clip_over_stages
from plop_dist.training.batch import OBJECTIVE_KEYS, Batch, row_token_losses
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.deepspeed import training_engine
from plop_dist.training.logits import Objective, Read, WholeLogits
from plop_dist.training.loop import StepEngine
from plop_dist.training.sums import from_last, sum_over
from plop_dist.values.placement import Placement

Base = tuple[nn.Module, dict[str, Any]]


class PipelineEngine:
    """An Engine over deepspeed.pipe.PipelineModule."""

    def __init__(self, config: Config, placement: Placement, base: Base | None = None):
        from deepspeed.pipe import PipelineModule

        self._config, self._placement = config, placement
        self._model, options = base or load_stage(config)
        layers = pipeline_layers(self._model)
        self.shards = add_stage_adapters(self._model, placement, lora_config(placement, config))
        set_initial(self.shards, config.train.seed)
        self._losses, self._scale, self._grad_norm = list[float](), 1.0, 0.0
        self._objective: Objective | None = None
        self._reader: Read | None = None
        self._found: list[Tensor] = []
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

    def step(
        self,
        micro_batches: Sequence[Batch],
        num_targets: int,
        learning_rate: float,
        objective: Objective | None = None,
    ) -> tuple[float, float]:
        """Run one optimizer step through DeepSpeed's 1F1B schedule. See Engine."""
        self.optimizer.set_learning_rate(learning_rate)
        # DeepSpeed averages over micro-batches and replicas; the loss is a mean over tokens.
        self._losses, self._scale = [], len(micro_batches) * self.dp_size / num_targets
        self._objective = objective
        self._engine.train_batch(iter([_as_pipe_input(batch) for batch in micro_batches]))
        if self._config.parallel.zero_stage:
            self._grad_norm = float(self._engine.get_global_grad_norm())
        return sum_over(self._pp_group, math.fsum(self._losses), device=self.device)[0], self._grad_norm

    def row_losses(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Return each row's loss without gradients. See Engine."""
        self._losses, self._scale, self._objective = [], 1.0, None
        self._evaluate(micro_batches)
        # The last stage alone has seen losses.
        rows = self._losses or [0.0] * sum(len(batch["input_ids"]) for batch in micro_batches)
        return sum_over(self._pp_group, *rows, device=self.device)

    def read_logits(self, micro_batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """Return what is read of each micro-batch's logits, from the last stage. See RewardedEngine."""
        self._found, self._reader = [], read
        self._evaluate(micro_batches)
        self._reader = None
        return from_last(self._pp_group, self._found, self.device)

    def generating(self) -> None:
        """Return nothing: no stage holds a whole model. See RewardedEngine."""

    def tracked(self, with_head: bool) -> Tracked:
        """Return the adapted stage for scoring. See Engine."""
        layers: list[Any] = list(self._pipe.forward_funcs)
        model = PipelineModel(layers, self._engine.grid, meta_model(self._config.model), with_head)
        return Tracked(model, [self._pipe])

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format. Collective over all ranks."""
        save_peft_adapter(directory, self.shards, self._placement, self._config, dp_rank=self.dp_rank)

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back, and leave the base model without adapters."""
        self._engine.destroy()
        remove_peft(self._model)

    def _evaluate(self, micro_batches: Sequence[Batch]) -> None:
        self._engine.eval_batch(
            iter([_as_pipe_input(batch) for batch in micro_batches]),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=len(micro_batches),
        )
        self._engine.fwd_outputs = []

    def _loss(self, logits: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        batch, whole = _from_pipe_targets(targets), WholeLogits(logits)
        if self._reader is not None:
            self._found.append(self._reader(whole, batch))
            return logits.new_zeros(())
        if self._objective is None:
            losses = row_token_losses(logits, batch["labels"])
        else:
            losses = self._objective(whole, batch).reshape(1)
        self._losses += losses.tolist()
        return losses.sum() * self._scale

    def _note_norm(self, norm: float) -> None:
        self._grad_norm = norm


def _as_pipe_input(batch: Batch) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """Return what DeepSpeed hands the first stage, and the last one: tensors alone, an empty one for what is not."""
    absent = torch.empty(0)
    further = tuple(batch.get(name, absent) for name in OBJECTIVE_KEYS)
    return (batch["input_ids"], batch["position_ids"], batch["attention_mask"]), (batch["labels"], *further)


def _from_pipe_targets(targets: tuple[Tensor, ...]) -> Batch:
    named = zip(OBJECTIVE_KEYS, targets[1:], strict=True)
    return {"labels": targets[0], **{name: tensor for name, tensor in named if tensor.numel()}}


ENGINE = StepEngine(PipelineEngine, load_stage, methods=("sft", "grpo"))
