"""What to do about a placement that a target refuses: changes that were tried, and that the target accepts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from plop_dist.choose.decision import decide
from plop_dist.choose.place import placement_with
from plop_dist.choose.policy import policy_of
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import ExportError, PlopError
from plop_dist.exporters.exporter import Exporter, find_exporter
from plop_dist.exporters.leaving_out import excluded_with
from plop_dist.registry import EXPORTERS, names
from plop_dist.values.placement import Export, Placement

_MARK = " Nearest choice:"  # what stands behind it was not tried yet
_MOST_ROUNDS = 12  # of leaving out what is refused next
_MORE_TYPES = 4
_MOST_TARGETS = 3


@dataclass(frozen=True)
class Remedy:
    """A change after which the target takes the placement.

    kind, value: "widen" (what is adapted beyond the choice), "engine" (its name), "place" (keys of the placement
    section with their values), "target" (its name).
    """

    kind: str
    value: Any

    def as_command(self, run_dir: str) -> str:
        """Return it as one types it for `plop-dist export`."""
        if self.kind == "place":
            return f"plop-dist place {shlex.quote(run_dir)} {_keys(self.value, quote=shlex.quote)} (and export again)"
        if self.kind == "widen":
            return f"--widen ({_sentences(self.value)})"
        return f"--{'to' if self.kind == 'target' else 'engine'} {self.value}"

    def as_key(self) -> str:
        """Return it as a key of the configuration."""
        if self.kind == "place":
            return _keys(self.value, "placement.")
        if self.kind == "widen":
            return f"export.widen=true ({_sentences(self.value)})"
        return f"export.targets=[{self.value}]" if self.kind == "target" else f"export.engine={self.value}"


def explained(
    error: ExportError,
    placement: Placement,
    target: str,
    engine: str | None,
    base: PlacementConfig,
    run_dir: str | None = None,
) -> ExportError:
    """Return the refusal with the remedies that were tried instead of those that the exporter thinks of.

    base: what placing anew starts from, so that remedies name every key that differs from it. run_dir: the directory,
    for commands to type; None: remedies are keys of the configuration.
    """
    texts = []
    for remedy in remedies(error, placement, target, engine):
        if remedy.kind == "place":
            remedy = Remedy("place", _beyond(base, {**placement.policy, **remedy.value}))
        texts.append(remedy.as_key() if run_dir is None else remedy.as_command(run_dir))
    if not texts:
        return error
    text = str(error).partition(_MARK)[0].rstrip().rstrip(".")
    return ExportError(f"{text}.{_MARK} {'; or '.join(texts)}.", error.types)


def remedies(error: ExportError, placement: Placement, target: str, engine: str | None) -> Iterator[Remedy]:
    """Yield what the target accepts, nearest first: more is adapted, another engine, another choice, another target."""
    exporter = find_exporter(target)
    widened = _tried(exporter, placement, engine, widen=True)
    if widened is not None and widened.widened:
        yield Remedy("widen", widened.widened)
    for other in exporter.engines:
        if other != engine and _tried(exporter, placement, other) is not None:
            yield Remedy("engine", other)
            break
    yield from _choices(error, placement, exporter, engine)
    exact = 0
    for name in names(EXPORTERS):
        if name != target and exact < _MOST_TARGETS and _tried(find_exporter(name), placement, None) is not None:
            exact += 1
            yield Remedy("target", name)


def _choices(error: ExportError, placement: Placement, exporter: Exporter, engine: str | None) -> Iterator[Remedy]:
    """Yield other placements from the same scores, by their keys."""
    given = placement.policy
    changes: list[dict[str, Any]] = []
    if given.get("granularity", "type") != "type":
        changes.append({"granularity": "type"})
    if given.get("rank_pattern"):
        changes.append({"rank_pattern": {}})
    if placement.alpha != int(placement.alpha):
        changes.append({"alpha": max(1, round(placement.alpha))})
    for change in changes:
        other = _placed(placement, change)
        if other is not None and _tried(exporter, other, engine) is not None:
            yield Remedy("place", change)
    left_out = _left_out(error, placement, exporter, engine)
    if left_out is not None:
        yield left_out
    for k in _larger_k(placement):
        other = _placed(placement, {"k": k})
        if other is not None and _tried(exporter, other, engine) is not None:
            yield Remedy("place", {"k": k})
            break


def _larger_k(placement: Placement) -> range:
    try:
        config = PlacementConfig.model_validate(placement.policy)
        has_k = "k" in policy_of(config).parameters and config.granularity == "type"
    except (PlopError, ValueError):  # a placement of another program's
        return range(0)
    return range(config.k + 1, config.k + 1 + _MORE_TYPES) if has_k else range(0)


def _left_out(error: ExportError, placement: Placement, exporter: Exporter, engine: str | None) -> Remedy | None:
    """Return the choice without what is refused: each time another one is refused instead, without that too."""
    types: dict[str, None] = {}
    refused = error
    for _ in range(_MOST_ROUNDS):
        if not set(refused.types) - types.keys():
            return None
        types.update(dict.fromkeys(refused.types))
        change = {"exclude": excluded_with(placement, _known(placement, types))}
        other = _placed(placement, change)
        if other is None:
            return None
        try:
            exporter.export(other, engine=engine)
        except ExportError as again:
            refused = again
        except Exception:  # another package's exporter
            return None
        else:
            return Remedy("place", change)
    return None


def _known(placement: Placement, types: Mapping[str, None]) -> list[str]:
    known = {entry.type for entry in placement.source.types}
    return [name for name in types if name in known]


def _beyond(base: PlacementConfig, policy: Mapping[str, Any]) -> dict[str, Any]:
    given = base.model_dump(mode="json")
    return {name: value for name, value in policy.items() if given.get(name) != value}


def _placed(placement: Placement, change: Mapping[str, Any]) -> Placement | None:
    """Return what the placement's own policy chooses with other keys, None where it refuses them."""
    try:
        config = PlacementConfig.model_validate(placement.policy)
        # The bootstrap is not asked: what is chosen does not depend on it.
        decision = decide(placement.source, config, **change)
        return placement_with(decision, decision.chosen_U)
    except (PlopError, ValueError):
        return None


def _tried(exporter: Exporter, placement: Placement, engine: str | None, *, widen: bool = False) -> Export | None:
    try:
        return exporter.export(placement, engine=engine, widen=widen)
    except Exception:  # refused, or another package's mistake: no remedy either way
        return None


def _keys(change: Mapping[str, Any], prefix: str = "", quote: Callable[[str], str] = str) -> str:
    return " ".join(quote(f"{prefix}{name}={_written(value)}") for name, value in change.items())


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_written(item)}' for name, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _sentences(items: tuple[str, ...]) -> str:
    return " ".join(items).rstrip(".")
