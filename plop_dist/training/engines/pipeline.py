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
from plop_dist.errors import LayoutError
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import check_complete, lora_config
from plop_dist.training.adapters.saved import save_peft_adapter
from plop_dist.training.adapters.shards import (
    AdapterShard,
    parameters_of,
    peft_shards,
    remove_peft,
)
from plop_dist.training.adapters.tensor_parallel import mark_sharded
from plop_dist.training.batch import OBJECTIVE_KEYS, Batch, row_token_losses
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.deepspeed import training_engine
from plop_dist.training.logits import Objective, Read, WholeLogits
from plop_dist.training.loop import StepEngine
from plop_dist.training.sums import clip_factor, from_last, grad_norm, sum_over
from plop_dist.values.placement import Placement

Base = tuple[nn.Module, dict[str, Any]]


class PipelineEngine:
    """An Engine over deepspeed.pipe.PipelineModule."""

    def __init__(self, config: Config, placement: Placement, base: Base | None = None):
        from deepspeed.pipe import PipelineModule

        self._config, self._placement = config, placement
        self._model, options = base or load_stage(config)
        layers = pipeline_layers(self._model)
        self.shards = self._add_adapters(self._model)
        for parameter in parameters_of(self.shards):
            mark_sharded(parameter, True)  # DeepSpeed's ZeRO norm counts unmarked parameters on the first stage alone
        self._losses, self._scale, self._grad_norm = list[float](), 1.0, 0.0
        self._objective: Objective | None = None
        self._reader: Read | None = None
        self._found: list[Tensor] = []
        self._pipe = PipelineModule(
            layers=layers, loss_fn=self._loss, activation_checkpoint_interval=0, dynamic_shape=True, **options
        )
        self._engine, self.optimizer = training_engine(self._pipe, self.shards, config)
        self._engine.clip_fp32_gradients = self._clip  # DeepSpeed's own does not keep the norm, and misses later stages
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

    def _add_adapters(self, model: nn.Module) -> list[AdapterShard]:
        """Put this stage's adapters into the model, set to the initial ones, and freeze the rest. Collective."""
        from peft import inject_adapter_in_model

        modules = dict(model.named_modules())
        here = [fqn for fqn in self._placement.modules if not isinstance(modules.get(fqn, nn.Identity()), nn.Identity)]
        self._check_stages(here)
        model.requires_grad_(False)
        peft_config = lora_config(self._placement, self._config)
        peft_config.target_modules = set(here)  # PEFT would adapt what stands in for another stage's head
        inject_adapter_in_model(peft_config, model)
        shards = peft_shards(model)
        set_initial(shards, self._config.train.seed)
        return shards

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

    def _clip(self) -> None:
        """Clip by the norm over all stages, and keep it. Collective over the pipeline."""
        self._grad_norm = grad_norm(self.shards, self.device, [self._pp_group])
        factor = clip_factor(self._grad_norm, self._config.train.max_grad_norm)
        for parameter in parameters_of(self.shards):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

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


def _as_pipe_input(batch: Batch) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """Return what DeepSpeed hands the first stage, and the last one: tensors alone, an empty one for what is not."""
    absent = torch.empty(0)
    further = tuple(batch.get(name, absent) for name in OBJECTIVE_KEYS)
    return (batch["input_ids"], batch["position_ids"], batch["attention_mask"]), (batch["labels"], *further)


def _from_pipe_targets(targets: tuple[Tensor, ...]) -> Batch:
    named = zip(OBJECTIVE_KEYS, targets[1:], strict=True)
    return {"labels": targets[0], **{name: tensor for name, tensor in named if tensor.numel()}}


ENGINE = StepEngine(PipelineEngine, load_stage, methods=("sft", "grpo"))
