"""Why each type is in or out, how sure the choice is, what the next-best would be, and what the alternatives cost."""

# M scored modules, U units, B resamples

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plop_dist.choose.decision import Decision, decide, decide_for, share_of
from plop_dist.choose.place import ordered_types
from plop_dist.choose.policy import Policy
from plop_dist.choose.units import rank_function
from plop_dist.errors import ConfigError, PlacementError, ScoresError
from plop_dist.registry import POLICIES, load
from plop_dist.values.adapter_size import AdapterSizes
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores


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


def explain(scores: Scores, placement: Placement, decision: Decision | None = None) -> Explanation:
    """Return why `placement`, drawn from `scores`, is as it is.

    decision: the one that the placement is of, where it is at hand. Raises ScoresError if its policy is not readable.
    """
    if decision is None:
        try:
            decision = decide(scores, **placement.policy)
        except ConfigError as error:
            raise ScoresError(f"placement.json: policy: {error}") from error
    explainer = _Explainer(scores, placement, decision)
    next_U, next_text = explainer.next_best()
    alternatives = [explainer.alternative("this placement", explainer.inside_M, placement.selection_confidence)]
    if next_U is not None:
        share = None if decision.choices is None else share_of(next_U, decision.choices)
        alternatives.append(explainer.alternative("next best", decision.candidates.chosen_modules(next_U), share))
    return Explanation(
        rule=decision.policy.sentence(decision.config),
        confidence=placement.selection_confidence,
        verdicts=tuple(explainer.verdicts()),
        next_best=next_text,
        alternatives=(*alternatives, *explainer.other_policies()),
    )


class _Explainer:
    """What the parts of an explanation have in common: inside_M: (M,), bool, the modules of the placement."""

    def __init__(self, scores: Scores, placement: Placement, decision: Decision) -> None:
        self._scores = scores
        self._decision = decision
        self._num_types = len(placement.module_types)
        self._nfn_M = decision.eligible.nfn
        self._types = ordered_types(scores)
        position = {name: index for index, name in enumerate(self._types)}
        self._type_M = np.array([position[module.type] for module in scores.modules])
        chosen = set(placement.modules)
        self.inside_M = np.array([module.fqn in chosen for module in scores.modules])
        # A fitted rank is the one all counts are made at.
        config = decision.config.model_copy(update={"rank": placement.rank})
        self._sizes: AdapterSizes = decision.candidates.sizes
        if config.rank != decision.config.rank:
            self._sizes = self._sizes.with_ranks(rank_function(config))

    def next_best(self) -> tuple[np.ndarray | None, str | None]:
        """Return the choice when its member nearest to the cut may not be chosen, and the difference in words."""
        decision, candidates = self._decision, self._decision.candidates
        values_U, chosen_U = candidates.unit_nfn, decision.chosen_U
        members = np.flatnonzero(chosen_U)
        weakest = int(members[decision.policy.order(values_U)[members].argmax()])
        without_U = np.where(np.arange(len(values_U)) == weakest, np.nan, values_U)
        other_U = decision.rule(without_U[None])[0]
        if not other_U.any() or (other_U == chosen_U).all():
            return None, None
        added = [candidates.units[unit] for unit in np.flatnonzero(other_U & ~chosen_U)]
        removed = [candidates.units[unit] for unit in np.flatnonzero(chosen_U & ~other_U)]
        if not added:
            return other_U, f"the same without {', '.join(removed)} (NFN {values_U[weakest]:.4f})"
        added_nfn = ", ".join(f"{values_U[unit]:.4f}" for unit in np.flatnonzero(other_U & ~chosen_U))
        return (
            other_U,
            f"{', '.join(added)} (NFN {added_nfn}) instead of {', '.join(removed)} ({values_U[weakest]:.4f})",
        )

    def alternative(self, name: str, chosen_M: np.ndarray, probability: float | None = None) -> Alternative:
        """Return what a choice of modules comes to. chosen_M: (M,), bool."""
        inside = np.bincount(self._type_M[chosen_M], minlength=len(self._types)) > 0
        return Alternative(
            name=name,
            module_types=tuple(entry for entry, is_inside in zip(self._types, inside, strict=True) if is_inside),
            num_modules=int(chosen_M.sum()),
            num_parameters=self._sizes.total(chosen_M),
            nfn=float(self._nfn_M[chosen_M].mean()),
            probability=probability,
        )

    def other_policies(self) -> list[Alternative]:
        """Return what the yardsticks among our own policies choose, by types and as many of them."""
        found = []
        config = self._decision.config
        for name in POLICIES.own:
            policy: Policy = load(POLICIES, name)
            if policy is self._decision.policy or not policy.is_yardstick:
                continue
            update = {"policy": name, "granularity": "type", "k": self._num_types, "options": {}}
            try:
                other = decide_for(self._scores, config.model_copy(update=update), self._decision.eligible)
            except PlacementError:
                continue  # a model without MLP projections has no such alternative
            found.append(self.alternative(name, other.candidates.chosen_modules(other.chosen_U)))
        return found

    def verdicts(self) -> list[Verdict]:
        """Return why each type is in or out, lowest NFN first."""
        decision, candidates = self._decision, self._decision.candidates
        entries = {entry.type: entry for entry in self._scores.types}
        cost_T = self._sizes.totals(self._type_M, len(self._types))
        probability_M = None
        if decision.choices is not None:
            probability_U = decision.choices.mean(axis=0)
            probability_M = np.where(candidates.unit_M >= 0, probability_U[candidates.unit_M], 0.0)
        by_type: dict[int, list[int]] = defaultdict(list)
        for index, type_ in enumerate(self._type_M.tolist()):
            by_type[type_].append(index)
        reason_of = decision.policy.reasons(candidates, candidates.unit_nfn, decision.chosen_U, decision.config)
        verdicts = []
        for position, name in enumerate(self._types):
            members = np.array(by_type[position])
            verdicts.append(
                Verdict(
                    type=name,
                    nfn=entries[name].nfn,
                    interval=entries[name].nfn_ci95,
                    num_modules=len(members),
                    num_chosen=int(self.inside_M[members].sum()),
                    reason=self._reason(members, reason_of),
                    probability=None if probability_M is None else float(probability_M[members].mean()),
                    num_parameters=int(cost_T[position]),
                )
            )
        return verdicts

    def _reason(self, members: np.ndarray, reason_of: Callable[[int], str]) -> str:
        candidates, granularity = self._decision.candidates, self._decision.config.granularity
        modules = (candidates.modules[index] for index in members.tolist())
        excluded = Counter(candidates.reasons[m.fqn] for m in modules if m.fqn in candidates.reasons)
        texts = [
            text if count == len(members) else f"{text} ({count} modules)" for text, count in excluded.most_common()
        ]
        units = candidates.unit_M[members]
        remaining = units[units >= 0]
        if len(remaining):
            if granularity == "type":
                texts.insert(0, reason_of(int(remaining[0])))
            else:
                num_chosen = int(self.inside_M[members].sum())
                texts.insert(0, f"{num_chosen} of {len(remaining)} lie in the chosen {granularity}s")
        return "; ".join(texts)
