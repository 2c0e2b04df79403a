"""What a policy is: one object that says what may be chosen, in which order, where the choice stops, and why.

README.md in this folder shows a whole one, of a package of its own.
"""

# U units (types, layers or modules), b rows of values (the scores themselves, or bootstrap resamples)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from plop_dist.choose.units import Candidates, Rule
from plop_dist.config.schema import PlacementConfig
from plop_dist.registry import POLICIES, load
from plop_dist.values.scores import Projection, TypeScore


class Policy(ABC):
    """One way to choose units by their NFN. Stateless: everything it needs to know is handed to it.

    name: the value of placement.policy; summary: one line for people; parameters: keys of the section `placement` that
    it reads besides those all policies share (rank, granularity, exclude, ...); options: keys of placement.options
    that it takes, with their defaults (others are refused by name); is_yardstick: --explain shows what it would choose
    beside the placement of any other policy, with k as many types; sets_rank: how large the adapters may be is part of
    it, so that placement.match has no say.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    is_yardstick: ClassVar[bool] = False
    sets_rank: ClassVar[bool] = False

    @abstractmethod
    def rule(self, candidates: Candidates, config: PlacementConfig) -> Rule:
        """Return the choice as a function of the units' NFN, (b, U) to (b, U), row by row independent.

        Ties go to the first unit; a unit whose value is NaN is not chosen. Raises PlacementError when no choice is
        possible whatever the values are.
        """

    @abstractmethod
    def sentence(self, config: PlacementConfig) -> str:
        """Return what is chosen in words, as in `Why · the 3 types with the lowest NFN`."""

    def check(self, config: PlacementConfig) -> None:
        """Raise ConfigError for a parameter or option that is missing or has a value the policy cannot work with.

        Called when a configuration is read, before anything is computed.
        """
        del config

    def reason_out(self, module: Projection, config: PlacementConfig) -> str | None:
        """Return why a module may not be chosen, beyond what the section `placement` excludes, or None if it may."""
        del module, config
        return None

    def order(self, values_bU: np.ndarray) -> np.ndarray:
        """Return what the policy prefers by, the smallest first: (b, U). By default the NFN itself."""
        return values_bU

    def rank(self, candidates: Candidates, chosen_U: np.ndarray, config: PlacementConfig) -> int:
        """Return the common rank of the adapters on the chosen units; alpha / rank stays what was asked for."""
        del candidates, chosen_U
        return config.rank

    def reasons(
        self, candidates: Candidates, values_U: np.ndarray, chosen_U: np.ndarray, config: PlacementConfig
    ) -> Callable[[int], str]:
        """Return the function that says of a unit, by its index, why it is chosen or not."""
        del candidates, values_U, config
        return lambda unit: f"policy {self.name} {'takes' if chosen_U[unit] else 'leaves'} it"

    def nothing_chosen(self, candidates: Candidates, values_U: np.ndarray, config: PlacementConfig) -> str:
        """Return the error message, remedy included, for a choice that is empty."""
        del values_U
        return (
            f"placement.policy '{self.name}' chooses none of the {len(candidates.units)} candidate "
            f"{config.granularity}s; change its parameters, or choose another policy."
        )

    def doubt(self, entries: Sequence[TypeScore], chosen: Collection[str], config: PlacementConfig) -> str | None:
        """Return why the types' 95% intervals put the choice in doubt, or None.

        entries: the candidate types that have an interval, lowest NFN first; chosen: the names of those that are in.
        Asked only where types are what is chosen between.
        """
        del entries, chosen, config
        return None

    def swept(self, candidates: Candidates, config: PlacementConfig) -> tuple[str, Sequence[Any]] | None:
        """Return what --sweep varies, a parameter or an option, and the values it takes in turn, smallest choice first.

        None: the first k units in the policy's order, for every k.
        """
        del candidates, config
        return None

    def settings(self, config: PlacementConfig) -> dict[str, Any]:
        """Return the policy's own options: those of the configuration, else their defaults."""
        return {**self.options, **config.options}

    def with_setting(self, config: PlacementConfig, key: str, value: Any) -> PlacementConfig:
        """Return the configuration with another value of one parameter or option."""
        update = {"options": {**config.options, key: value}} if key in self.options else {key: value}
        return config.model_copy(update=update)


def policy_of(config: PlacementConfig) -> Policy:
    """Return the policy that a configuration names. Raises ConfigError as registry.load does."""
    return load(POLICIES, config.policy)
