"""The step loop that the engines share: data order, schedule, logging, checkpoints, resume, held-out loss."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import torch

from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.config.schema import Config, TrainConfig
from plop_dist.errors import ConfigError
from plop_dist.registry import import_attribute
from plop_dist.rundir.events import phase
from plop_dist.rundir.layout import RunDir
from plop_dist.training.batch import Batch, count_targets, to_device, without_targets
from plop_dist.training.checkpoint import Checkpoints, fingerprint
from plop_dist.training.data import TrainingData, check_readable, count_rows
from plop_dist.training.engine import Data, Engine, Evaluating, Log, Stateful
from plop_dist.training.grpo.checks import check_layout
from plop_dist.training.stopping import stoppable
from plop_dist.training.sums import sum_over
from plop_dist.training.track import NfnTracker, with_head
from plop_dist.values.placement import Placement

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepEngine:
    """A training engine whose steps this loop drives: supervised fine-tuning, and GRPO where it says so.

    open: makes the Engine of this layout, for grpo a RewardedEngine. load: what of it does not depend on the placement,
    to be handed to `open` as its last argument, time and again; without it every Engine loads the model anew.
    Collective over all ranks.
    """

    open: Callable[..., Engine]
    load: Callable[[Config], Any] | None = None
    methods: tuple[str, ...] = ("sft",)

    def check(self, config: Config) -> None:
        """Raise ConfigError for what these loops do not train in a layout."""
        if config.train.method == "grpo":
            check_layout(config)

    def train(self, config: Config, placement: Placement, log: Log, data: Data | None = None) -> dict[str, Any]:
        """Train as run does, or as grpo/train.py does. See TrainingEngine."""
        self.check(config)
        if config.train.method == "grpo":
            train = import_attribute("plop_dist.training.grpo.train:train", "train.method grpo")
            return train(self.open, config, placement, log)
        if data is None:
            data = TrainingData(config, load_tokenizer(config.model))
            check_readable(config, data.longest)
        engine = self.open(config, placement)
        try:
            return run(engine, data, config, placement, log)
        finally:
            engine.close()

    def opener(self, config: Config) -> Callable[[Config, Placement], Engine]:
        """Return what opens an Engine for a placement. See Stepwise."""
        if self.load is None:
            return self.open
        base = self.load(config)
        return lambda config, placement: self.open(config, placement, base)


def run(engine: Engine, data: Data, config: Config, placement: Placement, log: Log) -> dict[str, Any]:
    """Train for train.max_steps, from the last complete checkpoint if there is one, and save the adapter.

    Returns held_out_before and held_out_after (mean loss per target token), num_steps, the adapter's directory and
    what count_rows says. Collective over all ranks.
    """
    train = config.train

    def begin() -> dict[str, Any]:
        return {"held_out_before": evaluate(engine, data.held_out)}

    def step(number: int) -> dict[str, Any]:
        return train_step(engine, data, train, number)

    progress = run_steps(engine, engine.optimizer, begin, step, config, placement, log)
    held_out_after = evaluate(engine, data.held_out)
    return {
        "held_out_before": progress["held_out_before"],
        "held_out_after": held_out_after,
        "num_steps": train.max_steps,
        **count_rows(data, config, train.max_steps),
        "adapter": save_adapter(engine, config),
    }


def run_steps(
    engine: Engine,
    stateful: Stateful,
    begin: Callable[[], dict[str, Any]],
    take_step: Callable[[int], dict[str, Any]],
    config: Config,
    placement: Placement,
    log: Log,
) -> dict[str, Any]:
    """Take train.max_steps steps, from the last complete checkpoint if there is one; return what `begin` returned.

    begin: what is noted before the first step, JSON values. take_step: runs a step, counted from 0, and returns its
    entry for the log. stateful: what a checkpoint keeps of a rank. A StepRefusedError of a step leaves a checkpoint of
    the steps before it. Collective over all ranks.
    """
    train = config.train
    tracker = _tracker(engine, config, placement)
    checkpoints = Checkpoints(config.run_path / "train" / "checkpoints", fingerprint(config, placement))
    last = checkpoints.load_last()
    if last is None:
        start, progress = 0, begin()
        if tracker is not None:
            log({"step": 0, "nfn": tracker.score()})
    else:
        start, state, progress = last
        logger.info("training goes on from step %d of %d", start, train.max_steps)
        stateful.load_state(state)
    saved = start
    with stoppable(RunDir(config.run_dir)) as stopping:
        for step in range(start, train.max_steps):
            try:
                log(take_step(step))
            except StepRefusedError as error:
                if step > saved:
                    checkpoints.save(step, stateful.state(), progress)
                raise StepRefusedError.keeping_others(error) from error
            if tracker is not None and (step + 1) % (train.track_nfn_every or 1) == 0:
                log({"step": step + 1, "nfn": tracker.score()})
            is_last, is_asked = step + 1 == train.max_steps, stopping.is_asked(engine.device)
            if (step + 1) % train.save_steps == 0 or is_last or is_asked:
                checkpoints.save(step + 1, stateful.state(), progress)
                saved = step + 1
            if is_asked and not is_last:  # see stopping: the run ends by SystemExit
                logger.info("training stopped after step %d of %d, with a checkpoint", step + 1, train.max_steps)
                stopping.leave()
    return progress


class StepRefusedError(ConfigError):
    """A step that could not be taken for a reason that is the user's to mend; raised on all ranks alike."""

    @classmethod
    def keeping_others(cls, error: StepRefusedError) -> StepRefusedError:
        """Return the same once a checkpoint holds the steps before it."""
        return cls(f"{error} The steps before this one are kept: run again to go on from them.")


def save_adapter(engine: Engine, config: Config) -> str:
    """Write the trained adapter into the run directory and return where it lies. Collective over all ranks."""
    phase("saving the adapter")
    directory = config.run_path / "train" / "adapter"
    engine.save_adapter(directory)
    return str(directory)


def micro_batch_indices(step: int, accumulation: int, dp_rank: int, dp_size: int) -> range:
    """Return which micro-batches of the run one replica sees in a step: the replicas take them in turn.

    accumulation: micro-batches per step and replica.

    >>> [list(micro_batch_indices(1, 2, dp_rank, 2)) for dp_rank in (0, 1)]
    [[4, 6], [5, 7]]
    """
    per_step = accumulation * dp_size
    return range(step * per_step + dp_rank, (step + 1) * per_step, dp_size)


def evaluate(engine: Evaluating, held_out: Sequence[Batch]) -> float:
    """Return the mean loss per target token of the held-out rows. Collective over all ranks."""
    phase(f"measuring the loss on {len(held_out)} held-out batches")
    losses = losses_of_rows(engine, held_out)
    return math.fsum(losses) / max(sum(count_targets(batch) for batch in held_out), 1)


def losses_of_rows(engine: Evaluating, held_out: Sequence[Batch]) -> list[float]:
    """Return the summed loss of every held-out row, in their order, on every rank. Collective over all ranks.

    Each replica reads its share; the last round is filled up with batches without targets, so that all replicas run
    equally often.
    """
    num_rounds = math.ceil(len(held_out) / engine.dp_size)
    places = [index * engine.dp_size + engine.dp_rank for index in range(num_rounds)]
    shares = []
    for at in places:
        batch = held_out[min(at, len(held_out) - 1)]
        shares.append(to_device(without_targets(batch) if at >= len(held_out) else batch, engine.device))
    own = iter(engine.row_losses(shares))
    starts = list(accumulate((len(batch["input_ids"]) for batch in held_out), initial=0))
    losses = [0.0] * starts[-1]
    for at, share in zip(places, shares, strict=True):
        rows = list(islice(own, len(share["input_ids"])))
        if at < len(held_out):
            losses[starts[at] : starts[at + 1]] = rows
    return sum_over(engine.dp_group, *losses, device=engine.device)


def learning_rate_at(train: TrainConfig, step: int) -> float:
    """Return the learning rate of a step counted from 0: linear warm-up, then the chosen decay towards max_steps.

    The same values as transformers' schedules of these names.
    """
    if step < train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    decay = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[train.lr_scheduler]
    return train.learning_rate * decay


def train_step(engine: Engine, data: Data, train: TrainConfig, step: int) -> dict[str, Any]:
    """Run one optimizer step, counted from 0, and return its entry for the log. Collective over all ranks."""
    seed_dropout(train.seed, step, engine.dp_rank)
    began = time.perf_counter()
    indices = micro_batch_indices(step, train.gradient_accumulation_steps, engine.dp_rank, engine.dp_size)
    micro_batches = [to_device(data.micro_batch(index), engine.device) for index in indices]
    num_tokens = float(sum(int(batch["attention_mask"].sum()) for batch in micro_batches))
    num_targets = float(sum(count_targets(batch) for batch in micro_batches))
    num_tokens, num_targets = sum_over(engine.dp_group, num_tokens, num_targets, device=engine.device)
    learning_rate, denominator = learning_rate_at(train, step), max(int(num_targets), 1)
    total, grad_norm = engine.step(micro_batches, denominator, learning_rate)
    return {
        "step": step + 1,
        "loss": sum_over(engine.dp_group, total, device=engine.device)[0] / denominator,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens_per_second": num_tokens / (time.perf_counter() - began),
    }


def _tracker(engine: Engine, config: Config, placement: Placement) -> NfnTracker | None:
    if config.train.track_nfn_every is None:
        return None
    tracked = engine.tracked(with_head(placement))
    tokenizer = load_tokenizer(config.model)
    return NfnTracker(config, placement, tokenizer, tracked.model, engine.shards, tracked.modules)


def seed_dropout(seed: int, step: int, dp_rank: int) -> None:
    """Key dropout by (seed, step, dp_rank): a resumed run draws the same masks without stored random state."""
    key = hashlib.sha256(f"dropout:{seed}:{step}:{dp_rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(key[:8], "little") >> 1)
