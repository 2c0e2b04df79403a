"""Every unit whose NFN lies below a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from plop_dist.choose.policy import Policy
from plop_dist.choose.units import Candidates, Rule
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import ConfigError
from plop_dist.values.scores import TypeScore


class Threshold(Policy):
    """All units with an NFN below placement.threshold."""

    name = "threshold"
    summary = "everything with an NFN below placement.threshold"
    parameters = ("threshold",)

    def check(self, config: PlacementConfig) -> None:
        """Raise ConfigError without a threshold."""
        if config.threshold is None:
            raise ConfigError("placement.policy=threshold needs placement.threshold, e.g. 1.0.")

    def rule(self, candidates: Candidates, config: PlacementConfig) -> Rule:
        """Return the comparison with the threshold."""
        threshold = _threshold(config)
        return lambda values_bU: values_bU < threshold

    def sentence(self, config: PlacementConfig) -> str:
        """Return, e.g., `every type with an NFN below 1`."""
        return f"every {config.granularity} with an NFN below {config.threshold:g}"

    def reasons(
        self, candidates: Candidates, values_U: np.ndarray, chosen_U: np.ndarray, config: PlacementConfig
    ) -> Callable[[int], str]:
        """Return on which side of the threshold a unit lies."""
        return lambda unit: f"{'below' if chosen_U[unit] else 'not below'} the threshold {config.threshold:g}"

    def nothing_chosen(self, candidates: Candidates, values_U: np.ndarray, config: PlacementConfig) -> str:
        """Return the lowest NFN there is, and the threshold that reaches it."""
        lowest = int(np.argmin(values_U))
        return (
            f"placement.threshold is {config.threshold:g}, but the lowest NFN is {values_U[lowest]:.4f} "
            f"({candidates.units[lowest]}); raise placement.threshold above "
            f"{math.ceil(values_U[lowest] * 1000) / 1000:g}."
        )

    def doubt(self, entries: Sequence[TypeScore], chosen: Collection[str], config: PlacementConfig) -> str | None:
        """Return which types' intervals hold the threshold."""
        threshold = _threshold(config)
        found = [entry for entry in entries if entry.interval[0] < threshold <= entry.interval[1]]
        if not found:
            return None
        listed = ", ".join(f"{e.type} {e.interval[0]:.4f} to {e.interval[1]:.4f}" for e in found)
        return f"The threshold {threshold:g} lies inside the interval of: {listed}."


def _threshold(config: PlacementConfig) -> float:
    assert config.threshold is not None, "the configuration is checked"
    return config.threshold


THRESHOLD = Threshold()
