"""What trainings are compared by: how train.method steps, and what the held-out rows are worth after that."""

# R held-out rows

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from plop_dist.compare.losses import HeldOutLoss
from plop_dist.compare.rewards import HeldOutReward
from plop_dist.config.schema import Config
from plop_dist.errors import DataError

CHOOSING, REPORTED = 0, 1  # the halves of the held-out rows, by parity
_FEWEST_ROWS = 8


class Method(Protocol):
    """One value of train.method, with the rows of a configuration. Every method is collective over all ranks."""

    measure: str  # "held-out loss"
    sign: int  # by which values are multiplied so that lower is better: 1 of losses, -1 of rewards
    targets_R: np.ndarray  # by how much each row counts in the mean: tokens in the loss, or 1 where a row has a reward

    def stepper(self, engine: Any, config: Config) -> Callable[[int], dict[str, Any]]:
        """Return what takes a step of a training, counted from 0, and returns its entry for the log."""
        ...

    def values(self, engine: Any, half: int) -> list[float]:
        """Return what the rows of one half are worth, in their order, on every rank: losses are sums over tokens."""
        ...

    def least_margin(self, values: Sequence[Sequence[float]]) -> float:
        """Return how large a difference of means counts at least. values: of reported rows, first without adapters."""
        ...

    def measurements_in(self, config: Config, dp_size: int) -> float:
        """Return how many times longer a training's steps take than it takes to measure all held-out rows."""
        ...


def method_of(config: Config) -> Method:
    """Return the method of train.method with its rows. Raises UserError for what they lack."""
    try:
        method: Method = {"sft": HeldOutLoss, "grpo": HeldOutReward}[config.train.method](config)
    except DataError as error:  # the key that says here how many rows are held out
        raise DataError(str(error).replace("train.eval_samples", "compare.held_out")) from error
    if len(method.targets_R) < _FEWEST_ROWS:
        raise DataError(
            f"compare.held_out is {config.train.eval_samples}, but only {len(method.targets_R)} held-out rows can be "
            f"measured, expected {_FEWEST_ROWS} at least; give more rows (data.path, train.eval_path)."
        )
    return method
