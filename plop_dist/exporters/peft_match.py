"""What PEFT itself adapts when it is given a configuration, without the model.

PEFT 0.21 does more than match names: beside experts that transformers keeps as 3-D parameters it renames targets, cuts
regexes down to bare names and doubles ranks. So PEFT is asked: it adapts a stand-in on the meta device that has the
scored modules' names and kinds. Where targets are names, one module stands for all that these names do not tell apart.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from plop_dist.errors import ConfigError
from plop_dist.exporters.holders import PASSED_BY_OUT_PROJ, RENAMED_BESIDE_EXPERTS, modules_above
from plop_dist.exporters.rank_pattern import RankPattern, as_peft_matches
from plop_dist.exporters.stand_in import stand_in
from plop_dist.exporters.suffixes import matcher
from plop_dist.values.scores import Projection
from plop_dist.values.time_limit import Pattern, check_time

_FIELDS = (
    "r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters",
    "modules_to_save",
)  # fmt: skip

Holders = Mapping[str, list[Projection]]


def adapted_ranks(
    adapter_config: Mapping[str, Any], projections: Iterable[Projection], model_type: str | None, where: str
) -> dict[str, int]:
    """Return the rank of the adapter on each holder (Projection.holder) that PEFT adapts.

    adapter_config: the fields of a peft.LoraConfig, each of its type (adapter_config.check); others than those that
    choose modules and ranks are passed over. model_type: transformers' name of the family. where: what it was read
    from, for messages. Raises ConfigError for what PEFT refuses, and for patterns that take too long.
    """
    by_holder: dict[str, list[Projection]] = {}
    for projection in projections:
        by_holder.setdefault(projection.holder, []).append(projection)
    fields = {name: adapter_config[name] for name in _FIELDS if adapter_config.get(name) is not None}
    ranks = adapter_config.get("rank_pattern") or {}
    texts = _texts(by_holder)
    check_time(_patterns(fields, ranks), texts, where)
    plain = _plainly(fields, by_holder, model_type)
    if plain is not None:
        paths, added = plain, dict[str, int]()
    elif isinstance(fields.get("target_modules"), str) or fields.get("layers_to_transform") is not None:
        _refuse_too_many(fields, len(texts), where)
        paths, added = _ask(fields, by_holder, model_type, where)
    else:
        paths, added = _ask_by_kind(fields, by_holder, model_type, where)
    # What PEFT adds stands over the file's entry of the same name, or behind them all.
    pattern = RankPattern({**ranks, **added})
    default = fields.get("r", 8)
    return {holder: pattern.rank_of(path, default) for holder, path in paths.items()}


def _plainly(fields: Mapping[str, Any], by_holder: Holders, model_type: str | None) -> dict[str, str] | None:
    """Return what PEFT adapts where it does no more than match names, without importing it, which takes seconds.

    None: it may do more. It renames beside experts, counts layers, wraps the same weight twice, refuses modules that it
    has no adapter for, and means something by "all-linear".
    """
    targets, excluded = fields.get("target_modules") or (), fields.get("exclude_modules")
    is_pattern = isinstance(targets, str)
    if "layers_to_transform" in fields or targets == "all-linear" or model_type in PASSED_BY_OUT_PROJ:
        return None
    if fields.get("target_parameters") and (excluded or fields.get("modules_to_save")):
        return None
    has_experts = any(parts[0].storage == "expert_parameter" for parts in by_holder.values())
    if has_experts and (is_pattern or any(name.rpartition(".")[2] in RENAMED_BESIDE_EXPERTS for name in targets)):
        return None
    is_target = re.compile(targets).fullmatch if is_pattern else matcher(targets)
    is_parameter = matcher(fields.get("target_parameters") or ())
    is_left_out = _left_out(fields)
    above = {module for path in by_holder for module in modules_above(path)}
    if any(is_target(module) for module in above):
        return None
    found, num_parameters = {}, 0
    for path, parts in by_holder.items():
        parameter = _parameter(path, parts)
        as_module, as_parameter = bool(is_target(path)) and not is_left_out(path), is_parameter(parameter)
        if not as_module and not as_parameter:
            continue
        is_expert = parts[0].storage == "expert_parameter"
        if as_module in (as_parameter, is_expert) or parts[0].storage in ("router", "other"):
            return None
        found[path] = path if as_module else parameter
        num_parameters += as_parameter
    # Why PEFT finds nothing is for PEFT to say.
    return None if not found or (fields.get("target_parameters") and not num_parameters) else found


def _patterns(fields: Mapping[str, Any], ranks: Mapping[str, int]) -> list[Pattern]:
    """Return what PEFT matches as regular expressions, in its own form."""
    found = [
        Pattern(name, value, rf"(?:{value})\Z")
        for name in ("target_modules", "exclude_modules")
        if isinstance(value := fields.get(name), str)
    ]
    layers = fields.get("layers_pattern") or []
    for value in [layers] if isinstance(layers, str) else layers:
        found.append(Pattern("layers_pattern", value, rf"(?:^|.*?\.){value}\.(?P<idx>\d+)\."))
    found += [Pattern("modules_to_save", value, _saved(value)) for value in fields.get("modules_to_save") or []]
    found += [Pattern("rank_pattern", value, as_peft_matches(value)) for value in RankPattern(ranks).regexes]
    return found


def _saved(name: str) -> str:
    return rf"(^|.*\.){name}($|\..*)"


def _texts(by_holder: Holders) -> set[str]:
    """Return everything that PEFT matches with a pattern: modules, parameters, and its own names for experts."""
    found = set()
    for path, parts in by_holder.items():
        found.update(modules_above(path))
        found.update((path, f"{path}.weight"))
        if parts[0].storage == "expert_parameter":
            found.update(f"{path.rpartition('.')[0]}.{name}" for name in RENAMED_BESIDE_EXPERTS)
    return found


def _refuse_too_many(fields: Mapping[str, Any], num_texts: int, where: str) -> None:
    for name in ("target_modules", "target_parameters", "exclude_modules"):
        names = fields.get(name) or ()
        if not isinstance(names, str) and len(names) * num_texts > 10**8:  # PEFT compares each with each: seconds
            raise ConfigError(
                f"{where}: {name} holds {len(names):,} names, too many beside a regular expression or "
                "layers_to_transform; write the modules as a list of names alone."
            )


def _ask_by_kind(
    fields: Mapping[str, Any], by_holder: Holders, model_type: str | None, where: str
) -> tuple[dict[str, str], dict[str, int]]:
    """Return what _ask does, asking about one holder of each kind.

    A name matches a path that is equal to it or ends with a dot and the name, so instead of names PEFT is given the
    whole paths of those modules that they match: for PEFT one module is then as good as another of the same last
    component, weight, and matches up to its root.
    """
    is_target = matcher(fields.get("target_modules") or ())
    is_parameter = matcher(fields.get("target_parameters") or ())
    is_left_out = _left_out(fields)

    @cache
    def marks(path: str) -> tuple[bool, bool]:
        return is_target(path), is_left_out(path)

    kinds: dict[tuple[Any, ...], list[str]] = {}
    for path, parts in by_holder.items():
        above = tuple(marks(module) for module in modules_above(path))
        kind = (parts[0].storage, path.rpartition(".")[2], marks(path), is_parameter(_parameter(path, parts)), above)
        kinds.setdefault(kind, []).append(path)
    asked = {alike[0]: by_holder[alike[0]] for alike in kinds.values()}
    texts = {text for path, parts in asked.items() for text in (path, _parameter(path, parts), *modules_above(path))}
    paths, added = _ask(_by_whole_paths(fields, texts), asked, model_type, where)
    return {
        holder: holder + paths[alike[0]].removeprefix(alike[0])
        for alike in kinds.values()
        if alike[0] in paths
        for holder in alike
    }, added


def _left_out(fields: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return whether PEFT passes over a module for exclude_modules or modules_to_save."""
    excluded = fields.get("exclude_modules") or ()
    is_excluded = re.compile(excluded).fullmatch if isinstance(excluded, str) else matcher(excluded)
    saved = [re.compile(_saved(name)).match for name in fields.get("modules_to_save") or ()]
    return lambda path: bool(is_excluded(path)) or any(match(path) for match in saved)


def _by_whole_paths(fields: Mapping[str, Any], texts: Iterable[str]) -> dict[str, Any]:
    """Return the fields with lists of names as the texts that they match, and what PEFT may rename."""
    asked = dict(fields)
    for field in ("target_modules", "target_parameters", "exclude_modules"):
        names = fields.get(field) or ()
        if not names or isinstance(names, str):
            continue
        asked[field] = sorted(filter(matcher(names), texts))
        if field == "target_modules":
            leaves = {name.rpartition(".")[2]: name for name in names}
            asked[field] += [leaves[leaf] for leaf in sorted(leaves.keys() & RENAMED_BESIDE_EXPERTS)]
        if field != "exclude_modules":
            asked[field] = asked[field] or list(names)[:1]  # PEFT says what it makes of a name that nothing has
    return asked


def _parameter(path: str, parts: list[Projection]) -> str:
    return path if parts[0].storage == "expert_parameter" else f"{path}.weight"


def _ask(
    fields: Mapping[str, Any], by_holder: Holders, model_type: str | None, where: str
) -> tuple[dict[str, str], dict[str, int]]:
    """Return the holders that PEFT adapts, each with the path by which it looks up a rank, and the ranks it adds."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    model = stand_in(by_holder, model_type)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(**fields)
            inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    except Exception as error:  # PEFT's own, and whatever a field makes it stumble over
        # A name may be that of a module which scoring leaves out (an embedding).
        if "not found in the base model" in str(error):
            return {}, {}
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{where}: PEFT refuses this configuration for {model_type or 'the model'}: {reason}"
        ) from error
    paths = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            path = name.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            path = f"{path}.{parameter}" if parameter else path
            # The weight of a linear, named as a parameter
            paths[path if path in by_holder else path.removesuffix(".weight")] = path
    return paths, dict(config.rank_pattern or {})
