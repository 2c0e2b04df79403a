"""What a training engine is: the interfaces between a layout's way to train, the rows, and the loop over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.config.schema import Config
from plop_dist.measure.protocols import ScorableModel
from plop_dist.training.adapters.shards import AdapterShard
from plop_dist.training.batch import Batch
from plop_dist.training.logits import Objective, Read
from plop_dist.values.placement import Placement

Log = Callable[[dict[str, Any]], None]  # takes one entry per step, see log.TrainingLog


class Data(Protocol):
    """Training rows in an endless order that no layout changes, and rows that are never trained on."""

    @property
    def held_out(self) -> Sequence[Batch]:
        """The held-out rows; every rank has them all."""
        ...

    def micro_batch(self, index: int) -> Batch:
        """Return the index-th micro-batch of the run; the same on every rank and in every run."""
        ...


class TrainingEngine(Protocol):
    """What TRAINING_ENGINES and EXTERNAL_ENGINES of the registry name: one way to continue a run."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The values of train.method that it knows."""
        ...

    def train(self, config: Config, placement: Placement, log: Log, data: Data | None = None) -> dict[str, Any]:
        """Train, and return the summary: num_steps and what the method has to say. Collective over all ranks.

        data: replaces the configured rows. Raises UserError for what the layout cannot train.
        """
        ...


@dataclass(frozen=True)
class Tracked:
    """An engine's adapted model as it is scored.

    model: its sites observe what training calls. modules: what switches between training and evaluation.
    """

    model: ScorableModel
    modules: Sequence[nn.Module]


class Stepwise(Protocol):
    """A training engine whose steps a caller may drive by himself, as comparisons do."""

    def opener(self, config: Config) -> Callable[[Config, Placement], Engine]:
        """Return what opens an Engine for a placement, over one base model that is loaded here, once.

        One Engine is open at a time: close it before the next. Collective over all ranks, as what is returned.
        """
        ...


class Evaluating(Protocol):
    """A model whose replicas share out the held-out rows."""

    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup | None  # None: one replica
    device: torch.device

    def row_losses(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Return each row's summed loss over this replica's micro-batches, in their order, without gradients.

        The same on every rank of the replica. Every replica passes the same number of micro-batches.
        """
        ...


class Stateful(Protocol):
    """What a checkpoint keeps of one rank."""

    def state(self) -> dict[str, Any]:
        """Return this rank's part of adapter and optimizer: tensors and plain values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what state() returned."""
        ...


class Engine(Evaluating, Protocol):
    """What the step loop asks of a layout (see loop.StepEngine); every method is collective over all ranks."""

    @property
    def shards(self) -> Sequence[AdapterShard]:
        """This rank's part of the adapters; a new engine has set them to the initial ones."""
        ...

    @property
    def optimizer(self) -> Stateful:
        """What trains them."""
        ...

    def step(self, micro_batches: Sequence[Batch], num_targets: int, learning_rate: float) -> tuple[float, float]:
        """Update the adapter, and return this replica's summed loss and the gradient's norm before clipping.

        The gradient is that of the loss summed over all replicas and divided by num_targets, the global batch's number
        of target tokens. Both numbers are the same on every rank of the replica, the norm on all ranks.
        """
        ...

    def tracked(self, with_head: bool) -> Tracked:
        """Return the model as it trains for scoring; with_head: the LM head too."""
        ...

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format with Hugging Face names."""
        ...

    def close(self) -> None:
        """Give back hooks and buffers that outlive the engine otherwise, and leave the base model without adapters."""
        ...


class RewardedEngine(Engine, Protocol):
    """An Engine that also trains for reward: other losses, and completions that the model itself writes."""

    def step(
        self,
        micro_batches: Sequence[Batch],
        num_targets: int,
        learning_rate: float,
        objective: Objective | None = None,
    ) -> tuple[float, float]:
        """Do as Engine.step does, with another loss of each micro-batch than the cross entropy of its labels."""
        ...

    def read_logits(self, micro_batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """Return what is read of each micro-batch's logits, without gradients or dropout, on every rank of the replica.

        Every replica passes the same number of micro-batches.
        """
        ...

    def generating(self) -> Any | None:
        """Return the adapted model in eval mode, where transformers' generate can run it; None where it cannot."""
        ...
