"""When the scores or the choice should not be trusted, and why: short findings with the figures behind them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

from plop_dist.types import ModuleScore, Placement, Scores

NEAR_ONE = 0.1
MIN_IN_FEATURES = 1000
MIN_CONFIDENCE = 0.9
MIN_TOKENS = 1000
MIN_SAMPLES = 16


@dataclass(frozen=True)
class Diagnostic:
    """One finding: `warning` puts the choice in doubt, `note` is worth knowing."""

    severity: Literal["warning", "note"]
    text: str


def diagnose(scores: Scores, placement: Placement | None = None) -> list[Diagnostic]:
    """Return what speaks against trusting the scores and, if given, the placement; warnings first."""
    findings = [
        *_near_one(scores),
        *_cut(scores, placement),
        *_narrow(scores, placement),
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
    text = (
        f"Every type's NFN is within {farthest:.3f} of 1, as for random weights: the width is too small, the data is "
        "foreign to the model, or the weights are not the trained ones."
    )
    return [Diagnostic("warning", text)]


def _cut(scores: Scores, placement: Placement | None) -> list[Diagnostic]:
    if placement is None:
        return []
    findings = []
    confidence = placement.selection_confidence
    if confidence is not None and confidence < MIN_CONFIDENCE:
        text = f"Only {confidence:.0%} of bootstrap resamples make the same choice; score more samples or change k."
        findings.append(Diagnostic("warning", text))
    if placement.policy.get("policy") == "lowest_k" and placement.policy.get("granularity") == "type":
        findings += _overlap(scores, placement)
    return findings


def _overlap(scores: Scores, placement: Placement) -> list[Diagnostic]:
    intervals = {entry.type: entry.nfn_ci95 for entry in scores.types}
    inside = set(placement.module_types)
    excluded = set(placement.policy.get("exclude", ()))
    highest_in = max((e for e in scores.types if e.type in inside), key=lambda e: e.nfn)
    outside = [e for e in scores.types if e.type not in inside | excluded and e.nfn >= highest_in.nfn]
    if not outside:
        return []
    lowest_out = min(outside, key=lambda e: e.nfn)
    last, first = intervals[highest_in.type], intervals[lowest_out.type]
    if last is None or first is None or last[1] <= first[0]:
        return []
    text = (
        f"The intervals at the cut overlap: {highest_in.type} (in) {last[0]:.4f} to {last[1]:.4f}, {lowest_out.type} "
        f"(out) {first[0]:.4f} to {first[1]:.4f}."
    )
    return [Diagnostic("warning", text)]


def _narrow(scores: Scores, placement: Placement | None) -> list[Diagnostic]:
    chosen = set(placement.modules) if placement is not None else {module.fqn for module in scores.modules}
    narrow: dict[str, int] = {}
    for module in scores.modules:
        if module.in_features < MIN_IN_FEATURES and module.fqn in chosen:
            narrow[module.type] = module.in_features
    if not narrow:
        return []
    listed = ", ".join(f"{name} ({width})" for name, width in sorted(narrow.items()))
    text = f"in_features below {MIN_IN_FEATURES:,}, outside the regime of the theory (wide layers): {listed}."
    return [Diagnostic("note", text)]


def _tokens(scores: Scores) -> list[Diagnostic]:
    by_type: dict[str, list[ModuleScore]] = defaultdict(list)
    for module in scores.modules:
        by_type[module.type].append(module)
    findings = []
    for name, modules in sorted(by_type.items()):
        few = [module for module in modules if module.num_tokens < MIN_TOKENS]
        if few:
            fewest = min(few, key=lambda module: module.num_tokens)
            text = (
                f"{name}: {len(few)} of {len(modules)} modules are scored from fewer than {MIN_TOKENS:,} tokens "
                f"(fewest: {fewest.num_tokens:,} at {fewest.fqn}); score more samples."
            )
            findings.append(Diagnostic("warning", text))
    return findings


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
    if not scores.left_out:
        return []
    counts = Counter(module.reason for module in scores.left_out)
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(counts.items()))
    harmless = set(counts) == {"no_tokens"}
    text = f"{len(scores.left_out)} modules have no score ({reasons}), among them {scores.left_out[0].fqn}."
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
