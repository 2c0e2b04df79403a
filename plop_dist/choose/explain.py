"""Why each type is in or out, how sure the choice is, what the next-best would be, and what the alternatives cost."""

# M scored modules, U units, B resamples

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from plop_dist.choose.bootstrap import PolicyFunction, resample
from plop_dist.choose.candidates import Candidates, find_candidates
from plop_dist.choose.place import choose_units, ordered_types
from plop_dist.choose.policies import build_policy, cost_function, rank_function, resolve_policy
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import ConfigError, PlacementError, ScoresError
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.placement import Placement
from plop_dist.values.scores import ModuleScore, Scores

_OTHER_POLICIES = ("lowest_k", "highest_k", "attention", "mlp", "all")


@dataclass(frozen=True)
class Verdict:
    """Why one type is in or out.

    probability: share of the type's modules chosen, averaged over bootstrap resamples, None without per-sample sums;
    num_parameters: of adapters on all modules of the type, at their rank.
    """

    type: str
    nfn: float
    interval: tuple[float, float] | None
    num_modules: int
    num_chosen: int
    reason: str
    probability: float | None
    num_parameters: int


@dataclass(frozen=True)
class Alternative:
    """Another choice at the same rank; nfn is the mean over its modules; probability as chosen by the bootstrap."""

    name: str
    module_types: tuple[str, ...]
    num_modules: int
    num_parameters: int
    nfn: float
    probability: float | None = None


@dataclass(frozen=True)
class Explanation:
    """A placement and everything around it: verdicts, lowest NFN first, and alternatives, the choice itself first.

    rule: the policy in words; next_best: the choice without its weakest member, in words, or None when there is none.
    """

    rule: str
    confidence: float | None
    verdicts: tuple[Verdict, ...]
    next_best: str | None
    alternatives: tuple[Alternative, ...]


def explain(scores: Scores, placement: Placement) -> Explanation:
    """Return why `placement`, drawn from `scores`, is as it is. Raises ScoresError if its policy is not readable."""
    try:
        config = resolve_policy(**placement.policy)
    except ConfigError as error:
        raise ScoresError(f"placement.json: policy: {error}") from error
    # A fitted rank is the one all counts are made at.
    config = config.model_copy(update={"rank": placement.rank})
    candidates = find_candidates(scores.modules, config, scores.left_out)
    choose = build_policy(candidates, config)
    chosen_U = choose_units(candidates, choose)
    choices_BU = None if scores.samples is None else resample(scores.modules, scores.samples, choose)
    next_U, next_text = _next_best(candidates, config, choose, chosen_U)
    alternatives = [_alternative("this placement", placement.chosen, scores, config, placement.selection_confidence)]
    if next_U is not None:
        share = None if choices_BU is None else float((choices_BU == next_U).all(axis=1).mean())
        alternatives.append(_alternative("next best", candidates.members(next_U), scores, config, share))
    alternatives += _other_policies(scores, config, len(placement.module_types))
    return Explanation(
        rule=_rule_text(config, placement),
        confidence=placement.selection_confidence,
        verdicts=tuple(_verdicts(scores, placement, config, candidates, chosen_U, choices_BU)),
        next_best=next_text,
        alternatives=tuple(alternatives),
    )


def _rule_text(config: PlacementConfig, placement: Placement) -> str:
    unit = config.granularity
    limit = config.max_trainable_parameters
    if config.policy == "threshold":
        return f"every {unit} with an NFN below {config.threshold:g}"
    if config.policy == "budget" and config.fit == "rank":
        return f"the {config.k} {unit}s with the lowest NFN, at the highest rank that fits {limit:,} parameters"
    if config.policy == "budget":
        return f"the {unit}s with the largest total NFN gap to the mean that fit {limit:,} parameters"
    if config.policy in ("lowest_k", "highest_k"):
        return f"the {config.k} {unit}s with the {config.policy.split('_')[0]} NFN"
    return {"attention": "all attention projections", "mlp": "all MLP projections"}.get(config.policy, "all candidates")


def _next_best(
    candidates: Candidates, config: PlacementConfig, choose: PolicyFunction, chosen_U: np.ndarray
) -> tuple[np.ndarray | None, str | None]:
    """Return the choice when its member nearest to the cut may not be chosen, and the difference in words."""
    nfn_M = np.array([module.nfn for module in candidates.modules])
    values_U = candidates.values(nfn_M[None])[0]
    members = np.flatnonzero(chosen_U)
    sign = -1.0 if config.policy == "highest_k" else 1.0
    weakest = int(members[(sign * values_U[members]).argmax()])
    without_M = np.where(candidates.unit_M == weakest, np.nan, nfn_M)
    other_U = choose(without_M[None])[0]
    if not other_U.any() or (other_U == chosen_U).all():
        return None, None
    added = [candidates.units[unit] for unit in np.flatnonzero(other_U & ~chosen_U)]
    removed = [candidates.units[unit] for unit in np.flatnonzero(chosen_U & ~other_U)]
    if not added:
        return other_U, f"the same without {', '.join(removed)} (NFN {values_U[weakest]:.4f})"
    added_nfn = ", ".join(f"{values_U[unit]:.4f}" for unit in np.flatnonzero(other_U & ~chosen_U))
    return other_U, f"{', '.join(added)} (NFN {added_nfn}) instead of {', '.join(removed)} ({values_U[weakest]:.4f})"


def _alternative(
    name: str, modules: Sequence[ModuleScore], scores: Scores, config: PlacementConfig, probability: float | None = None
) -> Alternative:
    types = {module.type for module in modules}
    return Alternative(
        name=name,
        module_types=tuple(entry for entry in ordered_types(scores) if entry in types),
        num_modules=len(modules),
        num_parameters=num_trainable_parameters(modules, rank_function(config), scores.left_out),
        nfn=sum(module.nfn for module in modules) / len(modules),
        probability=probability,
    )


def _other_policies(scores: Scores, config: PlacementConfig, num_types: int) -> list[Alternative]:
    found = []
    for policy in _OTHER_POLICIES:
        if policy == config.policy:
            continue
        other = config.model_copy(update={"policy": policy, "granularity": "type", "k": num_types})
        try:
            candidates = find_candidates(scores.modules, other, scores.left_out)
            chosen_U = choose_units(candidates, build_policy(candidates, other))
        except PlacementError:
            continue  # a model without MLP projections has no such alternative
        found.append(_alternative(policy, candidates.members(chosen_U), scores, config))
    return found


def _verdicts(
    scores: Scores,
    placement: Placement,
    config: PlacementConfig,
    candidates: Candidates,
    chosen_U: np.ndarray,
    choices_BU: np.ndarray | None,
) -> list[Verdict]:
    by_type: dict[str, list[int]] = defaultdict(list)
    for index, module in enumerate(scores.modules):
        by_type[module.type].append(index)
    entries = {entry.type: entry for entry in scores.types}
    inside = set(placement.modules)
    probability_U = None if choices_BU is None else choices_BU.mean(axis=0)
    reason_of = _unit_reasons(candidates, config, chosen_U)
    verdicts = []
    for name in ordered_types(scores):
        members = by_type[name]
        modules = [scores.modules[index] for index in members]
        units = candidates.unit_M[members]
        probability = None
        if probability_U is not None:
            probability = float(np.where(units >= 0, probability_U[units], 0.0).mean())
        verdicts.append(
            Verdict(
                type=name,
                nfn=entries[name].nfn,
                interval=entries[name].nfn_ci95,
                num_modules=len(modules),
                num_chosen=sum(module.fqn in inside for module in modules),
                reason=_reason(modules, units, candidates, config, inside, reason_of),
                probability=probability,
                num_parameters=num_trainable_parameters(modules, rank_function(config), scores.left_out),
            )
        )
    return verdicts


def _reason(
    modules: Sequence[ModuleScore],
    units: np.ndarray,
    candidates: Candidates,
    config: PlacementConfig,
    inside: set[str],
    reason_of: Callable[[int], str],
) -> str:
    excluded = Counter(candidates.reasons[module.fqn] for module in modules if module.fqn in candidates.reasons)
    texts = [text if count == len(modules) else f"{text} ({count} modules)" for text, count in excluded.most_common()]
    remaining = units[units >= 0]
    if len(remaining):
        if config.granularity == "type":
            texts.insert(0, reason_of(int(remaining[0])))
        else:
            num_chosen = sum(module.fqn in inside for module in modules)
            texts.insert(0, f"{num_chosen} of {len(remaining)} lie in the chosen {config.granularity}s")
    return "; ".join(texts)


def _unit_reasons(candidates: Candidates, config: PlacementConfig, chosen_U: np.ndarray) -> Callable[[int], str]:
    values_U = candidates.values(np.array([[module.nfn for module in candidates.modules]]))[0]
    sign = -1.0 if config.policy == "highest_k" else 1.0
    position_U = np.empty(len(values_U), dtype=np.int64)
    position_U[np.argsort(sign * values_U, kind="stable")] = np.arange(1, len(values_U) + 1)
    word = "highest" if config.policy == "highest_k" else "lowest"
    cost = cost_function(candidates, rank_function(config))

    def ranked(unit: int) -> str:
        side = "within" if chosen_U[unit] else "beyond"
        return f"number {position_U[unit]} of {len(values_U)}, {word} NFN first; {side} k = {config.k}"

    def budgeted(unit: int) -> str:
        mean, limit = np.nanmean(values_U), config.max_trainable_parameters or 0
        needs = cost([unit])
        if chosen_U[unit]:
            return f"gap {mean - values_U[unit]:+.4f} to the mean {mean:.4f} for {needs:,} parameters"
        if needs > limit:
            return f"its {needs:,} parameters alone exceed the limit of {limit:,}"
        if values_U[unit] >= mean:
            return f"not below the candidates' mean {mean:.4f}"
        return f"its {needs:,} parameters do not fit beside the set with the larger total gap"

    def constant(unit: int) -> str:
        if config.policy == "threshold":
            return f"{'below' if chosen_U[unit] else 'not below'} the threshold {config.threshold:g}"
        return f"policy {config.policy} takes it"

    if config.policy in ("lowest_k", "highest_k") or (config.policy == "budget" and config.fit == "rank"):
        return ranked
    return budgeted if config.policy == "budget" else constant
