"""From a YAML file, overrides or plain dictionaries to a checked configuration, or to one checked section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from plop_dist.config.checks import check_consistency, check_section
from plop_dist.config.messages import explain
from plop_dist.config.origin import origin_of
from plop_dist.config.references import Followed, check_followed, follow, is_kept_by_run, without_calls
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, UserError

_S = TypeVar("_S", bound=BaseModel)
_REPLACED = ("model.quantization", "model.max_memory")  # half of another kind's mapping would mean nothing


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration of a YAML file with `key=value` overrides laid over it.

    Raises ConfigError naming the file, the key, what was found and what is expected.
    """
    file = Path(path)
    if not file.is_file():
        state = "is not a file" if file.exists() else "does not exist"
        raise ConfigError(f"Config file '{file}' {state}; pass the path of a YAML file.")
    found = _read_tree(file, overrides)
    check_followed(found.unfollowed, str(file))
    try:
        return parse_config(found.values, str(file), found.references)
    except UserError as error:
        raise type(error)(origin_of(file, overrides).located(str(error))) from error


def stored_section(file: Path, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return one section of a configuration that a run has left behind, and the references in it by their keys.

    Nothing in it is resolved but interpolations of its own keys, and no other section is looked at.
    """
    found = _read_tree(file, (), is_stored=True)
    section = found.values.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: {name} is {section!r}, expected a section.")
    return section, {key: text for key, text in found.unfollowed.items() if key.startswith(f"{name}.")}


def parse_config(
    tree: Mapping[str, Any], source: str = "config", references: Mapping[str, str] | None = None
) -> Config:
    """Return the validated configuration of a plain dictionary; `source` is named in errors. Raises ConfigError.

    references: which of its keys came from references, and from which.
    """
    sections = {name for name in tree if name != "run_dir" and tree[name] is None}
    # `parallel:` with every key commented out is null in YAML, and means the defaults
    tree = {**tree, **{name: {} for name in sections if name in Config.model_fields}}
    config = _validated(Config, tree, source, prefix=()).with_references(references or {})
    check_consistency(config, source)
    return config


def parse_section(section: type[_S], options: Mapping[str, Any], source: str) -> _S:
    """Return one validated section of the configuration by itself; what is not in `options` has its default.

    Errors are those of a whole configuration: `source: placement.k: ...`. Raises ConfigError.
    """
    prefix = tuple(name for name, field in Config.model_fields.items() if field.annotation is section)
    parsed = _validated(section, options, source, prefix)
    check_section(parsed, source)
    return parsed


def split_override(override: str) -> tuple[str, Any]:
    """Return key and value of `key=value`; the value is YAML unless the key is a template or not valid YAML.

    A template's braces would be a YAML mapping; its `\\n` and `\\t` are a line break and a tab, as in quoted YAML.
    """
    import yaml

    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"Override '{override}' is not key=value, e.g. data.num_samples=64.")
    if key.endswith("template"):
        plain = None if text == "null" else text.replace("\\n", "\n").replace("\\t", "\t")
        return key.strip(), plain
    try:
        return key.strip(), _plain(yaml.safe_load(text), text) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: 2024-13-45, or a number of 5,000 digits
        return key.strip(), text


def _plain(value: Any, text: str) -> Any:
    if isinstance(value, date):
        return text
    # YAML 1.1 reads 2e-4 as text; everyone who types it means the number.
    if isinstance(value, str):
        try:
            return float(value) if any(letter in value for letter in "eE") else value
        except ValueError:
            return value
    return value


def _read_tree(file: Path, overrides: Sequence[str], *, is_stored: bool | None = None) -> Followed:
    """Return what the keys of a YAML file stand for. is_stored None: whether a run has left it is seen beside it."""
    import yaml
    from omegaconf import OmegaConf

    with _named(f"{file} cannot be read as YAML"):
        text = file.read_text(encoding="utf-8")
        is_mapping = isinstance(yaml.compose(text, Loader=yaml.SafeLoader), yaml.MappingNode)
        tree = OmegaConf.create(text) if is_mapping else None
        if tree is not None and (is_kept_by_run(file) if is_stored is None else is_stored):
            tree = without_calls(tree)
    if tree is None:
        raise ConfigError(f"{file} does not hold a mapping; expected keys such as model: and data:.")
    for override in overrides:
        key, value = split_override(override)
        with _named(f"{file}: the override '{override}' does not fit (a list is given whole: export.targets=[peft])"):
            is_merged = isinstance(value, dict) and bool(value) and key not in _REPLACED
            OmegaConf.update(tree, key, value, merge=is_merged)
    with _named(f"{file} cannot be resolved"):
        return follow(tree)


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # OmegaConf and PyYAML let through what int(), dates, deep nesting and indices raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{what}: {text}") from error


def _validated(section: type[_S], tree: Mapping[str, Any], source: str, prefix: tuple[str, ...]) -> _S:
    root = Config if prefix else section
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        found = [explain({**item, "loc": (*prefix, *item["loc"])}, root) for item in error.errors()]
        raise ConfigError("\n".join(f"{source}: {text}" for text in found)) from error
    except UnicodeEncodeError as error:  # pydantic compares texts as UTF-8
        odd = error.object[max(error.start - 40, 0) : error.end]
        raise ConfigError(f"{source}: {odd!r} holds what is no whole Unicode character; write it anew.") from None
