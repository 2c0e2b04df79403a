"""The rank at which a choice trains as many parameters as all linear layers would (placement.match)."""

from __future__ import annotations

import numpy as np

from plop_dist.choose.decision import Decision, decide_for
from plop_dist.values.scores import Scores


def matched_rank(decision: Decision, chosen_U: np.ndarray) -> int:
    """Return the common rank that brings a choice nearest to the parameters of policy `all` at placement.rank.

    At most min(in_features, out_features) of what is chosen; under Megatron, which shards adapters by their rank, a
    multiple of its tensor-parallel size. chosen_U: (U,), bool, some of them.
    """
    config = decision.config
    everything = decide_for(
        decision.scores,
        config.model_copy(update={"policy": "all", "granularity": "type", "options": {}, "match": None}),
        decision.eligible,
    )
    target = everything.candidates.sizes.total(everything.candidates.chosen_modules(everything.chosen_U))
    return nearest_rank(decision, chosen_U, target)


def nearest_rank(decision: Decision, chosen_U: np.ndarray, target: int) -> int:
    """Return the common rank that brings a choice nearest to so many parameters, within what matched_rank says."""
    candidates = decision.candidates
    # Adapters of one common rank grow with it in proportion, shared ones too.
    per_rank = candidates.sizes.with_ranks(lambda _: 1).total(candidates.chosen_modules(chosen_U))
    step = rank_step(decision.scores)
    most = min(min(module.in_features, module.out_features) for module in candidates.members(chosen_U))
    nearest = round(target / per_rank / step) * step
    return max(step, min(nearest, most // step * step))


def rank_step(scores: Scores) -> int:
    """Return the number that every rank is a multiple of: Megatron's tensor-parallel size, else 1."""
    parallel = scores.parallel
    size = parallel.get("tp", 1) if parallel.get("backend") == "megatron" else 1
    return size if isinstance(size, int) and size > 0 else 1
