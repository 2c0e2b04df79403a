"""What a policy chooses on given scores and on every bootstrap resample: found once, read by all who show it."""

# M scored modules, U units, B resamples

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from plop_dist.choose.candidates import Eligible, find_candidates, find_eligible
from plop_dist.choose.policy import Policy, policy_of
from plop_dist.choose.units import Candidates, Rule
from plop_dist.config.loading import parse_section
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import PlacementError
from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import ModuleScore, Scores


@dataclass(frozen=True, eq=False)
class Decision:
    """A policy, what it may choose between, its rule, and what that chooses: (U,), bool.

    Everything that is drawn from the samples is drawn when first asked for, and kept.
    """

    scores: Scores
    config: PlacementConfig
    policy: Policy
    eligible: Eligible
    candidates: Candidates
    rule: Rule
    chosen_U: np.ndarray

    @cached_property
    def choices(self) -> np.ndarray | None:
        """What the rule chooses on each bootstrap resample: (B, U), bool, or None without per-sample sums."""
        samples = self.scores.samples
        if samples is None:
            return None
        return np.concatenate([self.rule(values_bU) for values_bU in self.candidates.resampled(samples)])

    @property
    def confidence(self) -> float | None:
        """The share of resamples that make the same choice, or None without per-sample sums."""
        return None if self.choices is None else share_of(self.chosen_U, self.choices)


def decide(scores: Scores, policy: PlacementConfig | str | None = None, **options: Any) -> Decision:
    """Return the decision of a policy on scores. Arguments are those of `place`.

    Raises ConfigError and PlacementError as `place` does, except that the choice may be empty.
    """
    return decide_for(scores, resolve_policy(policy, **options))


def decide_for(scores: Scores, config: PlacementConfig, eligible: Eligible | None = None) -> Decision:
    """Return the decision under a checked configuration; eligible: of the same scores, exclude, include and experts."""
    eligible = eligible or find_eligible(scores.modules, config, scores.left_out)
    candidates = eligible.candidates(config)
    policy = policy_of(config)
    rule = policy.rule(candidates, config)
    return Decision(scores, config, policy, eligible, candidates, rule, _checked(rule, candidates, policy))


def selection_confidence(modules: Sequence[ModuleScore], samples: SampleTotals, config: PlacementConfig) -> float:
    """Return the fraction of bootstrap resamples in which the policy makes the same choice as on the scores themselves.

    Raises PlacementError as `place` does, ScoresError if `samples` lacks a module.
    """
    candidates = find_candidates(modules, config)
    rule = policy_of(config).rule(candidates, config)
    return candidates.share_of(rule(candidates.unit_nfn[None])[0], rule, samples)


def share_of(chosen_U: np.ndarray, choices_BU: np.ndarray) -> float:
    """Return the share of rows that are exactly this choice."""
    return float((choices_BU == chosen_U).all(axis=1).mean())


def resolve_policy(policy: PlacementConfig | str | None = None, **options: Any) -> PlacementConfig:
    """Return a validated placement configuration: `policy` with `options` laid over it.

    Raises ConfigError naming the field, the value and the expectation, with a suggestion for an unknown field.
    """
    if isinstance(policy, PlacementConfig):
        tree = {**policy.model_dump(), **options}
    else:
        tree = options if policy is None else {**options, "policy": policy}
    return parse_section(PlacementConfig, tree, source="place options")


def _checked(rule: Rule, candidates: Candidates, policy: Policy) -> np.ndarray:
    """Return what the rule chooses on the scores themselves. Raises PlacementError if that is no choice at all."""
    chosen_bU = np.asarray(rule(candidates.unit_nfn[None]))
    if chosen_bU.shape != (1, len(candidates.units)) or chosen_bU.dtype != bool:
        raise PlacementError(
            f"the rule of placement.policy '{policy.name}' returned {chosen_bU.dtype} of shape {chosen_bU.shape} for "
            f"values of shape (1, {len(candidates.units)}), expected bool of the same shape; tell its author."
        )
    return chosen_bU[0]
