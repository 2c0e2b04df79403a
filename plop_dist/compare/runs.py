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
from plop_dist.compare.method import CHOOSING, REPORTED, Method, method_of
from plop_dist.compare.resampling import is_behind
from plop_dist.config.schema import Config
from plop_dist.costs import peak
from plop_dist.errors import ConfigError
from plop_dist.training.engine import Engine
from plop_dist.training.train import engine_name, load_engine
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Value

_Values = tuple[Annotated[float, Field(allow_inf_nan=False)], ...]


class Record(Value):
    """What is kept of a training. Values are losses summed over a row's target tokens, or rewards.

    half: of the rows that choose, after half of the steps; choosing, reported: of each half of the rows at the end.
    Each None where it was not needed, or is not finite: then the training has diverged.
    """

    learning_rate: float
    seed: int
    steps: int
    stopped_early: bool
    diverged: bool
    half: _Values | None
    choosing: _Values | None
    reported: _Values | None
    tokens_per_second: float
    peak_memory_bytes: int
    seconds: float


class Base(Value):
    """What held-out rows are worth without adapters, how long that took, and what the steps of a training will take."""

    values: tuple[float, ...]
    measuring_seconds: float
    stepping_seconds: float


class Runs:
    """The trainings of a comparison, over one base model that is loaded when the first of them begins."""

    def __init__(self, config: Config, tell: Callable[..., None]) -> None:
        """config: its train section as every training has it, but for rate and seed. tell: gets each step's entry."""
        self._config, self._tell = config, tell
        self._open: Callable[[Config, Placement], Engine] | None = None
        self.method: Method = method_of(config)

    def measure_base(self, placement: Placement) -> Base:
        """Return what every held-out row is worth without adapters. Collective over all ranks."""
        engine = self._opened(self._config, placement)
        try:
            began, values = time.perf_counter(), [0.0] * len(self.method.targets_R)
            for half in (CHOOSING, REPORTED):  # B is zero: the adapter adds nothing
                values[half::2] = self.method.values(engine, half)
            seconds = time.perf_counter() - began
        finally:
            engine.close()
        stepping = seconds * self.method.measurements_in(self._config, engine.dp_size)
        return ranks.agree(lambda: Base(values=tuple(values), measuring_seconds=seconds, stepping_seconds=stepping))

    def train(self, config: Config, placement: Placement, rivals: Sequence[np.ndarray] | None) -> Record:
        """Train from the beginning and return the record. Collective over all ranks.

        rivals: values of other rates of the same arm after half of the steps, of the rows that choose; a training that
        is clearly behind one of them then stops. None: the rate is chosen, and the reported rows alone are measured.
        One whose loss is no number any more has diverged, and stops at once.
        """
        engine, train = self._opened(config, placement), config.train
        half, speeds, is_stopped, has_diverged = train.max_steps // 2, [], False, False
        found: dict[str, list[float]] = {}
        began = time.perf_counter()
        peak.begin()
        try:
            take_step, step = self.method.stepper(engine, config), 0
            while step < train.max_steps and not is_stopped and not has_diverged:
                entry = take_step(step)
                speeds.append(entry["tokens_per_second"])
                step += 1
                self._tell(entry)
                has_diverged = not math.isfinite(entry["loss"])
                if step == half and rivals is not None and not has_diverged:
                    found["half"] = self.method.values(engine, CHOOSING)
                    is_stopped = step < train.max_steps and self.is_hopeless(_finite(found["half"]), rivals)
            if not has_diverged and not is_stopped:
                if rivals is not None:
                    found["choosing"] = self.method.values(engine, CHOOSING)
                found["reported"] = self.method.values(engine, REPORTED)
            held = _largest(peak.read(), engine.device)
        finally:
            engine.close()
        seconds = time.perf_counter() - began
        measured = {name: _finite(found.get(name)) for name in ("half", "choosing", "reported")}
        return ranks.agree(
            lambda: Record(
                learning_rate=train.learning_rate, seed=train.seed, steps=step, stopped_early=is_stopped,
                diverged=has_diverged or any(measured[name] is None for name in found),
                peak_memory_bytes=held, seconds=seconds, **measured,
                # Without the first step, in which kernels are chosen and memory is asked for.
                tokens_per_second=float(np.mean(speeds[1:] or speeds)),
            )
        )  # fmt: skip

    def is_hopeless(self, values: Sequence[float] | None, rivals: Sequence[np.ndarray]) -> bool:
        """Tell whether a training has diverged, or is clearly behind one of its rivals, on the rows that choose."""
        if values is None:
            return True
        sign, targets_R = self.method.sign, self.method.targets_R[CHOOSING::2]
        return any(is_behind(sign * np.array(values), sign * rival, targets_R) for rival in rivals)

    def _opened(self, config: Config, placement: Placement) -> Engine:
        if self._open is None:
            # Who takes the steps of GRPO is not asked: the comparison does.
            train = config.train.model_copy(update={"engine": "auto"})
            name = engine_name(config.model_copy(update={"train": train}))
            found: Any = load_engine(name)
            opener = getattr(found, "opener", None)
            if opener is None:
                raise ConfigError(
                    f"compare drives the steps of a training by itself, but the training engine '{name}' has a loop of "
                    "its own; use another parallel section."
                )
            if train.method not in found.methods:
                raise ConfigError(
                    f"train.method is '{train.method}', but the training engine '{name}' knows only "
                    f"{', '.join(found.methods)}; use one of these, or another parallel section."
                )
            self._open = opener(config)
        assert self._open is not None
        return self._open(config, placement)


def _finite(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return tuple(values) if values is not None and all(map(math.isfinite, values)) else None


def _largest(value: int, device: torch.device) -> int:
    """Return the largest of all ranks' values. Collective over the world."""
    if not dist.is_initialized():
        return value
    box = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)
