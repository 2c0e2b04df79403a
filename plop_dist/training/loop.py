"""The step loop every engine shares: data order, schedule, logging, checkpoints, resume, held-out loss."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.backends.hf.model import is_packed
from plop_dist.config.schema import Config, TrainConfig
from plop_dist.measure.protocols import ScorableModel
from plop_dist.training.adapters.shards import AdapterShard
from plop_dist.training.checkpoint import Checkpoints, fingerprint
from plop_dist.training.track import NfnTracker, with_head
from plop_dist.values.placement import Placement

Batch = dict[str, Tensor]  # input_ids, attention_mask, labels, position_ids: (batch, sequence) int64
IGNORED = -100


class Data(Protocol):
    """Training rows in an order that depends on (seed, step) alone."""

    held_out: Sequence[Batch]

    def batch(self, step: int, dp_rank: int, dp_size: int) -> Sequence[Batch]:
        """Return this replica's micro-batches of one optimizer step."""
        ...


@dataclass(frozen=True)
class Tracked:
    """An engine's adapted model as it is scored.

    model: its sites observe what training calls. shards: this rank's adapters. modules: what switches between training
    and evaluation.
    """

    model: ScorableModel
    shards: Sequence[AdapterShard]
    modules: Sequence[nn.Module]


class Engine(Protocol):
    """One layout's way to run a step; every method is collective over all ranks."""

    dp_rank: int
    dp_size: int
    dp_group: dist.ProcessGroup | None
    device: torch.device

    def step(self, micro_batches: Sequence[Batch], num_targets: int, learning_rate: float) -> tuple[float, float]:
        """Update the adapter and return (loss, gradient norm before clipping), the same on every rank.

        loss: mean over the global batch's num_targets target tokens.
        """
        ...

    def sum_loss(self, micro_batches: Sequence[Batch]) -> float:
        """Return the summed loss of this replica's micro-batches without gradients, on every rank of the replica.

        Every replica passes the same number of micro-batches.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return this rank's part of adapter and optimizer: tensors and plain values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what state() returned."""
        ...

    def tracked(self, with_head: bool) -> Tracked:
        """Return the model as it trains for scoring; with_head: the LM head too."""
        ...

    def save_adapter(self, directory: Path) -> None:
        """Write the whole adapter in PEFT's format with Hugging Face names."""
        ...


def run(
    engine: Engine, data: Data, config: Config, placement: Placement, log: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train for train.max_steps, from the last complete checkpoint if there is one, and save the adapter.

    Returns held_out_before and held_out_after (mean loss per target token), num_steps and the adapter's directory.
    Collective over all ranks.
    """
    train, directory = config.train, config.run_path / "train"
    tracker = _tracker(engine, config, placement)
    checkpoints = Checkpoints(directory / "checkpoints", fingerprint(config, placement))
    last = checkpoints.load_last()
    if last is None:
        start, progress = 0, {"held_out_before": evaluate(engine, data.held_out)}
        if tracker is not None:
            log({"step": 0, "nfn": tracker.score()})
    else:
        start, state, progress = last
        engine.load_state(state)
    for step in range(start, train.max_steps):
        _seed(train.seed, step, engine.dp_rank)
        began = time.perf_counter()
        micro_batches = [_to(batch, engine.device) for batch in data.batch(step, engine.dp_rank, engine.dp_size)]
        num_tokens, num_targets = _totals(engine, micro_batches)
        learning_rate = learning_rate_at(train, step)
        loss, grad_norm = engine.step(micro_batches, num_targets, learning_rate)
        log(
            {
                "step": step + 1,
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_second": num_tokens / (time.perf_counter() - began),
            }
        )
        if tracker is not None and (step + 1) % (train.track_nfn_every or 1) == 0:
            log({"step": step + 1, "nfn": tracker.score()})
        if (step + 1) % train.save_steps == 0 or step + 1 == train.max_steps:
            checkpoints.save(step + 1, engine.state(), progress)
    held_out_after = evaluate(engine, data.held_out)
    engine.save_adapter(directory / "adapter")
    return {
        "held_out_before": progress["held_out_before"],
        "held_out_after": held_out_after,
        "num_steps": train.max_steps,
        "adapter": str(directory / "adapter"),
    }


def evaluate(engine: Engine, held_out: Sequence[Batch]) -> float:
    """Return the mean loss per target token of the held-out rows. Collective over all ranks.

    Each replica reads its share; the last round is filled up with batches without targets, so that all replicas run
    equally often.
    """
    num_rounds = math.ceil(len(held_out) / engine.dp_size)
    shares = []
    for index in range(num_rounds):
        at = index * engine.dp_size + engine.dp_rank
        batch = held_out[min(at, len(held_out) - 1)]
        if at >= len(held_out):
            batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
        shares.append(_to(batch, engine.device))
    total = engine.sum_loss(shares)
    sums = sum_over(engine.dp_group, total, float(sum(count_targets(batch) for batch in shares)), device=engine.device)
    return sums[0] / max(sums[1], 1.0)


def learning_rate_at(train: TrainConfig, step: int) -> float:
    """Return the learning rate of a step counted from 0: linear warm-up, then the chosen decay towards max_steps.

    The same values as transformers' schedules of these names.
    """
    if step < train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    decay = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[train.lr_scheduler]
    return train.learning_rate * decay


def sum_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross entropy of the next tokens, float32 scalar; labels of -100 are left out.

    logits: (batch, sequence, vocab), any float dtype; labels: (batch, sequence), not shifted.
    """
    targets = labels[:, 1:].reshape(-1)
    predictions = logits[:, :-1].reshape(-1, logits.size(-1)).float()
    return cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum")


def count_targets(batch: Batch) -> int:
    """Return how many next tokens of the micro-batch have a label."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Return the arguments of a transformers model's forward pass for this micro-batch.

    Packed rows go without a mask: only then transformers keeps samples apart, by their position_ids. Padding, always on
    the right, is out of the real tokens' sight even so.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,
    }
    if not is_packed(batch["position_ids"], batch["attention_mask"]):
        inputs["attention_mask"] = batch["attention_mask"]
    return inputs


def sum_over(group: dist.ProcessGroup | None, *values: float, device: torch.device) -> list[float]:
    """Return each value summed over the group in float64. Collective over `group`; None: one rank."""
    if group is None:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals, group=group)
    return totals.tolist()


def _tracker(engine: Engine, config: Config, placement: Placement) -> NfnTracker | None:
    if config.train.track_nfn_every is None:
        return None
    tracked = engine.tracked(with_head(placement))
    tokenizer = load_tokenizer(config.model)
    return NfnTracker(config, placement, tokenizer, tracked.model, tracked.shards, tracked.modules)


def _totals(engine: Engine, micro_batches: Sequence[Batch]) -> tuple[float, int]:
    num_tokens = float(sum(int(batch["attention_mask"].sum()) for batch in micro_batches))
    num_targets = float(sum(count_targets(batch) for batch in micro_batches))
    tokens, targets = sum_over(engine.dp_group, num_tokens, num_targets, device=engine.device)
    return tokens, max(int(targets), 1)


def _seed(seed: int, step: int, dp_rank: int) -> None:
    """Key dropout by (seed, step, dp_rank): a resumed run draws the same masks without stored random state."""
    key = hashlib.sha256(f"dropout:{seed}:{step}:{dp_rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(key[:8], "little") >> 1)


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
