"""When the scores or the choice should not be trusted, and why: short findings with the figures behind them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Any, Literal

from plop_dist.choose.candidates import find_candidates
from plop_dist.choose.decision import Decision, resolve_policy
from plop_dist.choose.policy import policy_of
from plop_dist.values.adapter_ranks import oversized_ranks
from plop_dist.values.placement import Placement
from plop_dist.values.scores import LeftOut, ModuleScore, Scores

NEAR_ONE = 0.1
MIN_IN_FEATURES = 1000
MIN_CONFIDENCE = 0.9
MIN_TOKENS = 1000
MIN_SAMPLES = 16
_RECURRENT = ("recurrent", "kernel")


@dataclass(frozen=True)
class Diagnostic:
    """One finding: `warning` puts the choice in doubt, `note` is worth knowing."""

    severity: Literal["warning", "note"]
    text: str


def diagnose(scores: Scores, placement: Placement | None = None, decision: Decision | None = None) -> list[Diagnostic]:
    """Return what speaks against trusting the scores and, if given, the placement; warnings first.

    decision: the one that the placement is of, where it is at hand. Raises ConfigError if the placement's policy is not
    readable.
    """
    findings = [
        *_near_one(scores),
        *_cut(scores, placement, decision),
        *_granularity(scores, placement),
        *_narrow(scores, placement),
        *_oversized(placement),
        *_recurrent(scores, placement),
        *_tokens(scores),
        *_skipped(scores),
        *_left_out(scores),
        *_samples(scores, placement),
    ]
    return sorted(findings, key=lambda finding: finding.severity != "warning")


def _near_one(scores: Scores) -> list[Diagnostic]:
    farthest = max(abs(entry.nfn - 1) for entry in scores.types)
    if farthest >= NEAR_ONE:
        return []
    # Not the data: a trained model's are far from 1 on random tokens too. Nor the width: 64 is wide enough for 1.
    text = (
        f"Every type's NFN is within {farthest:.3f} of 1, as measured for weights that were never trained, at any "
        "width; see whether model.name_or_path, or model.checkpoint, holds the trained ones. It is not the data."
    )
    return [Diagnostic("warning", text)]


def _cut(scores: Scores, placement: Placement | None, decision: Decision | None) -> list[Diagnostic]:
    if placement is None:
        return []
    findings = []
    confidence = placement.selection_confidence
    if confidence is not None and confidence < MIN_CONFIDENCE:
        parameters = policy_of(resolve_policy(**placement.policy)).parameters
        other = f" or change placement.{' or placement.'.join(parameters)}" if parameters else ""
        text = f"Only {confidence:.0%} of bootstrap resamples make the same choice; score more samples{other}."
        findings.append(Diagnostic("warning", text))
    return [*findings, *_doubt(scores, placement, decision)]


def _doubt(scores: Scores, placement: Placement, decision: Decision | None) -> list[Diagnostic]:
    """Ask the policy whether the types' intervals put its choice in doubt, among those that it may choose."""
    config = resolve_policy(**placement.policy) if decision is None else decision.config
    if config.granularity != "type":
        return []
    found = find_candidates(scores.modules, config, scores.left_out) if decision is None else decision.candidates
    candidates = set(found.units)
    entries = [entry for entry in scores.types if entry.type in candidates and entry.nfn_ci95 is not None]
    text = policy_of(config).doubt(entries, placement.module_types, config)
    return [] if text is None else [Diagnostic("warning", text)]


def _granularity(scores: Scores, placement: Placement | None) -> list[Diagnostic]:
    """Say why a choice of single layers or modules is experimental, with these scores' own figures."""
    config = None if placement is None else resolve_policy(**placement.policy)
    if config is None or config.granularity == "type":
        return []
    policy = policy_of(config)
    if not policy.parameters and not policy.options:  # whole blocks, whatever is chosen between
        return []
    modules = [module for module in scores.modules if module.layer is not None and module.nfn > 0]
    of_types, of_layers = (_share_between(modules, key) for key in ("type", "layer"))
    text = (
        f"Granularity {config.granularity} is experimental: of the variance of the modules' log NFN {of_types:.0%} "
        f"lies between types and {of_layers:.0%} between layers, and a gain over choosing types has not been shown."
    )
    return [Diagnostic("note", text)]


def _share_between(modules: Sequence[ModuleScore], key: Literal["type", "layer"]) -> float:
    """Return which share of the variance of log NFN is that of the groups' means, 0 where there is none."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for module in modules:
        groups[getattr(module, key)].append(math.log(module.nfn))
    values = [value for group in groups.values() for value in group]
    total = pvariance(values) if values else 0.0
    if total == 0:
        return 0.0
    mean = fmean(values)
    return sum(len(group) * (fmean(group) - mean) ** 2 for group in groups.values()) / (len(values) * total)


def _narrow(scores: Scores, placement: Placement | None) -> list[Diagnostic]:
    chosen = set(placement.modules) if placement is not None else {module.fqn for module in scores.modules}
    narrow: dict[str, int] = {}
    for module in scores.modules:
        if module.in_features < MIN_IN_FEATURES and module.fqn in chosen:
            narrow[module.type] = min(module.in_features, narrow.get(module.type, MIN_IN_FEATURES))
    if not narrow:
        return []
    listed = ", ".join(f"{name} ({width})" for name, width in sorted(narrow.items()))
    text = f"in_features below {MIN_IN_FEATURES:,}: {listed}. The theory is one of wide layers; how wide is not known."
    return [Diagnostic("note", text)]


def _oversized(placement: Placement | None) -> list[Diagnostic]:
    if placement is None:
        return []
    oversized = oversized_ranks(placement.chosen, placement.rank_of)
    if not oversized:
        return []
    shown = ", ".join(f"{item.type} (rank {item.rank}, {item.most} at most)" for item in oversized)
    pattern = ", ".join(f"{item.type}: {item.most}" for item in oversized)
    text = (
        f"Adapters have a higher rank than any update of their weights can have: {shown}; "
        f"placement.rank_pattern={{{pattern}}} trains less for the same."
    )
    return [Diagnostic("warning", text)]


def _recurrent(scores: Scores, placement: Placement | None) -> list[Diagnostic]:
    """Say which chosen types lie in the recurrent layers of a model that has others too, and how to leave them out."""
    is_hybrid = any(module.role is None and module.layer is not None for module in scores.modules)
    if placement is None or not is_hybrid:
        return []
    inside = [module for module in placement.chosen if module.role in _RECURRENT]
    if not inside:
        return []
    elsewhere = {module.type for module in scores.modules if module.role not in _RECURRENT}
    types = sorted({module.type for module in inside})
    entries = [name for name in types if name not in elsewhere]
    entries += sorted({".".join(module.fqn.rsplit(".", 2)[-2:]) for module in inside if module.type in elsewhere})
    text = (
        f"{', '.join(types)} lie in the recurrent layers of this hybrid model ({len(inside)} of the chosen modules), "
        "where adapters have cost accuracy (arXiv 2604.22127); placement.exclude=["
        f"{','.join(dict.fromkeys([*placement.policy.get('exclude', []), *entries]))}] leaves them out."
    )
    return [Diagnostic("warning", text)]


def _tokens(scores: Scores) -> list[Diagnostic]:
    by_type: dict[str, list[ModuleScore]] = defaultdict(list)
    for module in scores.modules:
        by_type[module.type].append(module)
    thin = []
    for name, modules in sorted(by_type.items()):
        few = [module.num_tokens for module in modules if module.num_tokens < MIN_TOKENS]
        if few:
            thin.append(f"{name} ({len(few)} of {len(modules)} modules, fewest {min(few):,})")
    if not thin:
        return []
    text = f"Scored from fewer than {MIN_TOKENS:,} tokens: {', '.join(thin)}; score more samples."
    return [Diagnostic("warning", text)]


def _skipped(scores: Scores) -> list[Diagnostic]:
    skipped = [module for module in scores.modules if module.num_skipped_tokens]
    if not skipped:
        return []
    worst = max(skipped, key=lambda module: module.num_skipped_tokens / (module.num_tokens + module.num_skipped_tokens))
    total = worst.num_tokens + worst.num_skipped_tokens
    share = worst.num_skipped_tokens / total
    text = (
        f"{len(skipped)} modules skipped tokens whose input is zero or not finite; most at {worst.fqn}: "
        f"{worst.num_skipped_tokens:,} of {total:,} ({share:.1%})."
    )
    return [Diagnostic("warning" if share > 0.01 else "note", text)]


def _left_out(scores: Scores) -> list[Diagnostic]:
    unknown = [entry for entry in scores.left_out if entry.reason == "unknown_kind"]
    others = [entry for entry in scores.left_out if entry.reason != "unknown_kind"]
    return [*_unknown(unknown), *_without_score(others)]


def _unknown(weights: Sequence[LeftOut]) -> list[Diagnostic]:
    """Say which weights nothing here can score, so that no policy can weigh them: they may be most of the model."""
    if not weights:
        return []
    by_type: dict[str, list[LeftOut]] = defaultdict(list)
    for weight in weights:
        by_type[weight.type].append(weight)
    named = ", ".join(f"{members[0].fqn} ({len(members)} of type {name})" for name, members in sorted(by_type.items()))
    text = (
        f"Weights that multiply activations in a manner that is not known here are neither scored nor ever chosen: "
        f"{named}. Whether adapters would pay there is not known."
    )
    return [Diagnostic("warning", text)]


def _without_score(modules: Sequence[LeftOut]) -> list[Diagnostic]:
    if not modules:
        return []
    counts = Counter(module.reason for module in modules)
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(counts.items()))
    harmless = set(counts) == {"no_tokens"}
    text = f"{len(modules)} modules have no score ({reasons}), among them {modules[0].fqn}."
    return [Diagnostic("note" if harmless else "warning", text)]


def _samples(scores: Scores, placement: Placement | None) -> list[Diagnostic]:
    if scores.samples is None:
        if placement is None:
            return []
        return [Diagnostic("note", "No samples.safetensors beside the scores: the choice's confidence is unknown.")]
    num_samples = len(scores.samples.sample_ids)
    if num_samples >= MIN_SAMPLES:
        return []
    text = f"Scored from {num_samples} samples: the bootstrap understates the uncertainty below {MIN_SAMPLES}."
    return [Diagnostic("note", text)]
