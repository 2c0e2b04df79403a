"""One training of one arm at one rate from one seed: what it ends with for every held-out row, and what it took."""

# R held-out rows

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field

from plop_dist import ranks
from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.compare.resampling import is_behind
from plop_dist.config.schema import Config
from plop_dist.costs import peak
from plop_dist.errors import ConfigError, DataError
from plop_dist.training.batch import Batch, count_targets
from plop_dist.training.data import TrainingData
from plop_dist.training.engine import Engine
from plop_dist.training.loop import losses_of_rows, train_step
from plop_dist.training.train import engine_name, load_engine
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Value

_FEWEST_ROWS = 8
_FORWARD_PASSES = 3.0  # what a training step costs: forward, and back through a frozen model with adapters

_Losses = tuple[Annotated[float, Field(allow_inf_nan=False)], ...]


class Record(Value):
    """What is kept of a training. Losses are summed over each row's target tokens; None: not finite.

    half: of the rows that choose, after half of the steps; losses: of all rows at the end, or where it stopped.
    """

    learning_rate: float
    seed: int
    steps: int
    stopped_early: bool
    half: _Losses | None
    losses: _Losses | None
    tokens_per_second: float
    peak_memory_bytes: int
    seconds: float


class Runs:
    """The trainings of a comparison, over one base model that is loaded when the first of them begins."""

    def __init__(self, config: Config, tell: Callable[..., None]) -> None:
        """config: its train section as every training has it, but for rate and seed. tell: called after each step."""
        self._config, self._tell = config, tell
        self._open: Callable[[Config, Placement], Engine] | None = None
        self._data: dict[int, TrainingData] = {}
        self.held_out = self.data(config).held_out
        # Each row alone knows how many of its tokens are in the loss.
        self.targets_R = np.array([count_targets(row) for row in _single_rows(self.held_out)], dtype=np.float64)
        if len(self.targets_R) < _FEWEST_ROWS:
            raise DataError(
                f"compare.held_out is {config.train.eval_samples}, but only {len(self.targets_R)} held-out rows have "
                f"a token in the loss, expected {_FEWEST_ROWS} at least; give more rows (data.path, train.eval_path)."
            )

    def data(self, config: Config) -> TrainingData:
        """Return the rows of a training; their order depends on its seed."""
        seed = config.train.seed
        if seed not in self._data:
            try:
                self._data[seed] = TrainingData(config, load_tokenizer(config.model))
            except DataError as error:  # the key that says here how many rows are held out
                raise DataError(str(error).replace("train.eval_samples", "compare.held_out")) from error
        return self._data[seed]

    def measure_base(self, placement: Placement) -> tuple[list[float], float]:
        """Return every held-out row's loss without adapters, and the seconds that a training is going to take."""
        engine = self._opened(self._config, placement)
        try:
            losses_of_rows(engine, self.held_out[:1])  # warms up
            began = time.perf_counter()
            losses = losses_of_rows(engine, self.held_out)  # B is zero: the adapter adds nothing
            seconds = time.perf_counter() - began
        finally:
            engine.close()
        train, num_held_out = self._config.train, sum(int(batch["attention_mask"].sum()) for batch in self.held_out)
        per_step = train.gradient_accumulation_steps * engine.dp_size
        data = self.data(self._config)
        num_tokens = sum(int(data.micro_batch(index)["attention_mask"].sum()) for index in range(per_step))
        of_steps = train.max_steps * _FORWARD_PASSES * num_tokens / max(num_held_out, 1)
        return losses, seconds * (of_steps + 1.5)

    def train(self, config: Config, placement: Placement, rivals: Sequence[np.ndarray]) -> Record:
        """Train from the beginning and return the record. Collective over all ranks.

        rivals: losses of other rates of the same arm after half of the steps, of the rows that choose; a training that
        is clearly behind one of them then stops.
        """
        engine, data, train = self._opened(config, placement), self.data(config), config.train
        half, speeds, is_stopped, rows = train.max_steps // 2, [], False, None
        began = time.perf_counter()
        peak.begin()
        try:
            step = 0
            while step < train.max_steps and not is_stopped:
                entry = train_step(engine, data, train, step)
                speeds.append(entry["tokens_per_second"])
                step += 1
                self._tell(entry["loss"])
                if step == half:
                    rows = losses_of_rows(engine, self.held_out)
                    is_stopped = step < train.max_steps and self.is_hopeless(_finite(rows), rivals)
            at_half = None if rows is None else _finite(rows[::2])
            losses = rows if is_stopped and rows is not None else losses_of_rows(engine, self.held_out)
            held = _largest(peak.read(), engine.device)
        finally:
            engine.close()
        seconds = time.perf_counter() - began
        return ranks.agree(
            lambda: Record(
                learning_rate=train.learning_rate, seed=train.seed, steps=step, stopped_early=is_stopped, half=at_half,
                losses=_finite(losses), peak_memory_bytes=held, seconds=seconds,
                # Without the first step, in which kernels are chosen and memory is asked for.
                tokens_per_second=float(np.mean(speeds[1:] or speeds)),
            )
        )  # fmt: skip

    def is_hopeless(self, rows: Sequence[float] | None, rivals: Sequence[np.ndarray]) -> bool:
        """Tell whether a training has diverged, or is clearly behind one of its rivals.

        rows: every held-out row's loss, or of the rows that choose alone.
        """
        if rows is None:
            return True
        own = np.array(rows[::2] if len(rows) == len(self.targets_R) else rows)
        return any(is_behind(own, rival, self.targets_R[::2]) for rival in rivals)

    def _opened(self, config: Config, placement: Placement) -> Engine:
        if self._open is None:
            name = engine_name(config)
            opener: Any = getattr(load_engine(name), "opener", None)
            if opener is None:
                raise ConfigError(
                    f"compare drives the steps of a training by itself, but the training engine '{name}' has a loop of "
                    "its own; use another parallel section."
                )
            self._open = opener(config)
        assert self._open is not None
        return self._open(config, placement)


def _single_rows(batches: Sequence[Batch]) -> list[Batch]:
    return [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]


def _finite(losses: Sequence[float]) -> tuple[float, ...] | None:
    return tuple(losses) if all(map(math.isfinite, losses)) else None


def _largest(value: int, device: torch.device) -> int:
    """Return the largest of all ranks' values. Collective over the world."""
    if not dist.is_initialized():
        return value
    box = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)
