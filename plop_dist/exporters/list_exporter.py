"""How a framework that hands a list of names to PEFT is exported to: one mechanism, of which a target is the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plop_dist.exporters.counts import count_note
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.holders import Targets, hugging_face_targets
from plop_dist.exporters.peft import MATCHING, rank_patterns
from plop_dist.exporters.peft_read import adapted_by_peft
from plop_dist.exporters.refusals import (
    PARAMETERS,
    PART,
    RANKS,
    UNFIT,
    WHOLE_ALPHA,
    check_engine,
    one_rank,
    refuse_parameters,
    whole_number,
)
from plop_dist.values.placement import Export, Placement


def as_list(value: Any) -> list[str]:
    """Return names as a list, where one alone may stand by itself."""
    return [value] if isinstance(value, str) else list(value)


def _list_of_names(targets: Targets) -> Any:
    return list(targets.modules)


@dataclass(frozen=True, kw_only=True)
class ListExporter:
    """The exporter of one such framework.

    rank, alpha, modules, parameters: its keys; without `parameters` (PEFT's target_parameters) 3-D experts are refused.
    patterns: its keys for rank_pattern and alpha_pattern; without them ranks that differ are refused. first, then:
    fields before rank and before the names. beside_parameters: what must hold where parameters are adapted.
    without_modules: what stands for an empty list of names, where there are parameters alone. names: how the names are
    written; read_names: as PEFT is handed what is written. text, flags: fields -> the content of `file` and the flags.
    """

    name: str
    summary: str
    rank: str
    alpha: str
    modules: str
    file: str
    text: Callable[[Mapping[str, Any]], str]
    flags: Callable[[Mapping[str, Any]], tuple[str, ...]]
    flags_in: Language = "shell"
    engine: str | None = None
    parameters: str | None = None
    patterns: tuple[str, str] | None = None
    first: Mapping[str, Any] = field(default_factory=dict)
    then: Mapping[str, Any] = field(default_factory=dict)
    beside_parameters: Mapping[str, Any] = field(default_factory=dict)
    without_modules: Mapping[str, Any] = field(default_factory=dict)
    names: Callable[[Targets], Any] = _list_of_names
    read_names: Callable[[Any], Any] = as_list
    matching: str = MATCHING
    further_limits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def engines(self) -> tuple[str, ...]:
        """The one engine, by default the target itself."""
        return (self.engine or self.name,)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that an export can set."""
        named = (self.rank, self.alpha, *self.then, self.modules, self.parameters, *(self.patterns or ()))
        every = (*self.first, *named, *self.beside_parameters, *self.without_modules)
        return tuple(dict.fromkeys(key.lstrip("+") for key in every if key))

    @property
    def limits(self) -> tuple[str, ...]:
        """What it cannot express."""
        return (
            PART,
            *(() if self.parameters else (PARAMETERS,)),
            *(() if self.patterns else (RANKS,)),
            WHOLE_ALPHA,
            *self.further_limits,
            UNFIT,
        )

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return the flags and the file. Raises ExportError for what `limits` says."""
        check_engine(engine, self.engines, self.name)
        targets = hugging_face_targets(placement, self.name, widen)
        if self.parameters is None:
            refuse_parameters(targets, self.name)
        rank, alpha, widened = placement.rank, placement.alpha, ()
        if self.patterns is None:
            rank, alpha, widened = one_rank(targets.ranks, placement, self.name, widen)
        fields = {
            **self.first,
            self.rank: rank,
            self.alpha: whole_number(alpha, self.name),
            **self.then,
            **self._names(targets),
            **self._rank_patterns(placement, targets),
        }
        return Export(
            target=self.name,
            files={self.file: self.text(fields)},
            flags=self.flags(fields),
            notes=(*targets.notes, *count_note(placement, targets), *self.notes),
            widened=(*targets.widened, *widened),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what such a file adapts: what PEFT does when it is handed the names."""
        given = {key.lstrip("+"): value for key, value in fields.items()}
        patterns = dict(zip(("rank_pattern", "alpha_pattern"), self.patterns or (), strict=False))
        config: dict[str, Any] = {
            "r": int(given[self.rank.lstrip("+")]),
            "lora_alpha": float(given[self.alpha.lstrip("+")]),
            "target_modules": self.read_names(
                given.get(self.modules.lstrip("+"), next(iter(self.without_modules.values()), []))
            ),
            **{field: given[key] for field, key in patterns.items() if key in given},
        }
        if self.parameters is not None and self.parameters.lstrip("+") in given:
            config["target_parameters"] = as_list(given[self.parameters.lstrip("+")])
        return adapted_by_peft(config, placement, where)

    def _names(self, targets: Targets) -> dict[str, Any]:
        fields = {self.modules: self.names(targets)}
        if targets.parameters and self.parameters is not None:
            fields |= {self.parameters: list(targets.parameters), **self.beside_parameters}
        if not targets.modules and self.without_modules:
            fields |= self.without_modules
            if self.modules not in self.without_modules:
                del fields[self.modules]
        return fields

    def _rank_patterns(self, placement: Placement, targets: Targets) -> dict[str, Any]:
        if self.patterns is None:
            return {}
        ranks, alphas = rank_patterns(placement, targets)
        whole = {name: whole_number(alpha, self.name) for name, alpha in alphas.items()}
        return {self.patterns[0]: ranks, self.patterns[1]: whole} if ranks else {}
