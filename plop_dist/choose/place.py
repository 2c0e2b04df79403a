"""Where the adapters go: the modules that a policy chooses from scores. Instant; needs no model and no framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from plop_dist.choose.bootstrap import PolicyFunction, selection_confidence
from plop_dist.choose.candidates import Candidates, find_candidates
from plop_dist.choose.diagnostics import diagnose
from plop_dist.choose.policies import build_policy, highest_fitting_rank, resolve_policy
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import PlacementError
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.names import natural_key
from plop_dist.values.placement import PLACEMENT_SCHEMA, Placement
from plop_dist.values.scores import ModuleScore, Scores


def place(scores: Scores, policy: PlacementConfig | str | None = None, **options: Any) -> Placement:
    """Return the placement that a policy draws from scores.

    policy: the section `placement` of a configuration, the name of a policy, or None for the defaults; options: single
    fields over it (k, rank, exclude, ...). selection_confidence is P(the same choice) over bootstrap resamples of the
    calibration samples, and None when the scores carry no per-sample sums. Deterministic.

    Raises ConfigError for an unknown or invalid option and PlacementError when k exceeds the number of candidates, a
    name matches no module, or nothing satisfies the policy.
    """
    config = resolve_policy(policy, **options)
    candidates = find_candidates(scores.modules, config, scores.left_out)
    choose = build_policy(candidates, config)
    chosen_U = choose_units(candidates, choose)
    if not chosen_U.any():
        raise PlacementError(_nothing_chosen(candidates, config))
    modules = candidates.members(chosen_U)
    is_rank_fitted = config.policy == "budget" and config.fit == "rank"
    rank = highest_fitting_rank(modules, config, scores.left_out) if is_rank_fitted else config.rank
    samples = scores.samples
    confidence = None if samples is None else selection_confidence(scores.modules, samples, choose)
    placement = _placement(scores, config, modules, rank, confidence)
    return placement.model_copy(
        update={"diagnostics": tuple(item.text for item in diagnose(scores, placement))}
    ).with_source(scores)


def policy_function(modules: Sequence[ModuleScore], policy: PlacementConfig) -> PolicyFunction:
    """Return the policy as a function from NFN (b, M), in the order of `modules`, to choices (b, U), bool.

    What bootstrap.selection_confidence takes. Raises PlacementError as `place` does.
    """
    return build_policy(find_candidates(modules, policy), policy)


def choose_units(candidates: Candidates, choose: PolicyFunction) -> np.ndarray:
    """Return the policy's choice on the scores themselves: (U,), bool."""
    return choose(np.array([[module.nfn for module in candidates.modules]]))[0]


def _placement(
    scores: Scores, config: PlacementConfig, modules: Sequence[ModuleScore], rank: int, confidence: float | None
) -> Placement:
    types = {module.type for module in modules}
    names = types | {module.fqn for module in modules}
    placement = Placement(
        schema=PLACEMENT_SCHEMA,
        policy=config.model_dump(mode="json"),
        module_types=tuple(name for name in ordered_types(scores) if name in types),
        modules=tuple(module.fqn for module in modules),
        rank=rank,
        # alpha / rank scales the adapter's output: that ratio stays what the user asked for.
        alpha=config.alpha * rank / config.rank,
        rank_pattern={name: rank for name, rank in config.rank_pattern.items() if name in names},
        num_trainable_parameters=0,
        selection_confidence=confidence,
    )
    count = num_trainable_parameters(modules, placement.rank_of, scores.left_out)
    return placement.model_copy(update={"num_trainable_parameters": count}).with_source(scores)


def ordered_types(scores: Scores) -> list[str]:
    """Return all types, lowest NFN first, ties in natural order of their names."""
    return [entry.type for entry in sorted(scores.types, key=lambda e: (round(e.nfn, 12), natural_key(e.type)))]


def _nothing_chosen(candidates: Candidates, config: PlacementConfig) -> str:
    values = candidates.values(np.array([[module.nfn for module in candidates.modules]]))[0]
    lowest = int(np.argmin(values))
    return (
        f"placement.threshold is {config.threshold:g}, but the lowest NFN is {values[lowest]:.4f} "
        f"({candidates.units[lowest]}); raise placement.threshold above {math.ceil(values[lowest] * 1000) / 1000:g}."
    )
