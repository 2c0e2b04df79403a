"""Where the adapters go: the modules that a policy chooses from scores. Instant; needs no model and no framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from plop_dist.choose.decision import Decision, decide
from plop_dist.choose.diagnostics import diagnose
from plop_dist.choose.matching import matched_rank
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import PlacementError, RankError
from plop_dist.values.adapter_ranks import oversized_ranks, refused_ranks
from plop_dist.values.names import natural_key
from plop_dist.values.placement import PLACEMENT_SCHEMA, Placement
from plop_dist.values.scores import Scores


def place(scores: Scores, policy: PlacementConfig | str | None = None, **options: Any) -> Placement:
    """Return the placement that a policy draws from scores.

    policy: the section `placement` of a configuration, the name of a policy, or None for the defaults; options: single
    fields over it (k, rank, exclude, ...). selection_confidence is P(the same choice) over bootstrap resamples of the
    calibration samples, and None when the scores carry no per-sample sums. Deterministic.

    Raises ConfigError for an unknown or invalid option and PlacementError when k exceeds the number of candidates, a
    name matches no module, or nothing satisfies the policy.
    """
    return placement_of(decide(scores, policy, **options))


def placement_of(decision: Decision) -> Placement:
    """Return the placement that a decision comes to. Raises PlacementError as placement_with does."""
    placement = placement_with(decision, decision.chosen_U).model_copy(
        update={"selection_confidence": decision.confidence}
    )
    placement = placement.with_source(decision.scores)
    texts = tuple(finding.text for finding in diagnose(decision.scores, placement, decision))
    return placement.model_copy(update={"diagnostics": texts}).with_source(decision.scores)


def placement_with(decision: Decision, chosen_U: np.ndarray) -> Placement:
    """Return the placement of any choice among a decision's candidates, without confidence and diagnostics.

    chosen_U: (U,), bool. Raises PlacementError for none, and where every adapter's rank is higher than its weight's.
    """
    candidates, config = decision.candidates, decision.config
    if not chosen_U.any():
        raise PlacementError(decision.policy.nothing_chosen(candidates, candidates.unit_nfn, config))
    if config.match is None:
        rank = decision.policy.rank(candidates, chosen_U, config)
        # alpha / rank scales the adapter's output: that ratio stays what the user asked for.
        alpha = config.alpha * rank / config.rank
    else:  # as a comparison at equal size needs it: a fixed alpha / rank would give high ranks a higher rate
        rank, alpha = matched_rank(decision, chosen_U), config.alpha
    modules = candidates.members(chosen_U)
    types = {module.type for module in modules}
    names = types | {module.fqn for module in modules}
    placement = Placement(
        schema=PLACEMENT_SCHEMA,
        policy=config.model_dump(mode="json"),
        module_types=tuple(name for name in ordered_types(decision.scores) if name in types),
        modules=tuple(module.fqn for module in modules),
        rank=rank,
        alpha=alpha,
        rank_pattern={name: rank for name, rank in config.rank_pattern.items() if name in names},
        num_trainable_parameters=0,
        selection_confidence=None,
        scores_digest=decision.scores.digest,
    )
    oversized = oversized_ranks(modules, placement.rank_of)
    if len(oversized) == len(types):  # where it is only some of them, a diagnostic says so
        raise RankError(refused_ranks(oversized, rank, config.rank_pattern))
    sizes = candidates.sizes if rank == config.rank else candidates.sizes.with_ranks(placement.rank_of)
    update = {"num_trainable_parameters": sizes.total(candidates.chosen_modules(chosen_U))}
    return placement.model_copy(update=update).with_source(decision.scores)


def ordered_types(scores: Scores) -> list[str]:
    """Return all types, lowest NFN first, ties in natural order of their names."""
    return [entry.type for entry in sorted(scores.types, key=lambda e: (round(e.nfn, 12), natural_key(e.type)))]
