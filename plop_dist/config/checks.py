"""Which keys of the configuration go together, beyond what each of them allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from plop_dist.config.schema import (
    RANDOM_TOKENS,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PlacementConfig,
    TrainConfig,
)
from plop_dist.errors import ConfigError, LayoutError, suggest
from plop_dist.registry import BACKENDS, POLICIES, REWARDS, load, names
from plop_dist.values.secret_texts import REDACTED, names_secret, secret_part, without_secrets
from plop_dist.values.visible import check_names, holds_text, strings

_MOST_RANKS = 2**20


def check_consistency(config: Config, source: str) -> None:
    """Raise ConfigError or LayoutError for keys that do not go together; `source` is named in it."""
    _check_secrets(config, source)
    _check_references(config, source)
    for name in Config.model_fields:
        check_section(getattr(config, name), source)
    parallel, workers = config.parallel, config.cluster.num_workers
    record = load(BACKENDS, parallel.backend)
    record.check(config, source)
    if config.model.quantization is not None:
        record.check_quantized(config, f"{source}: model.quantization", config.model.quantization["quant_method"])
    _check_placing(config, source)
    _check_random(config, source)
    if config.train.method == "sft" and record.training_engine(config) is None:
        raise ConfigError(
            f"{source}: train.method is sft, but parallel.backend '{parallel.backend}' trains nothing in this layout; "
            "set train.method=none, and train elsewhere with an export."
        )
    if workers is not None and workers != parallel.world_size:
        raise ConfigError(
            f"{source}: {parallel.layout.product_text} = {parallel.world_size}, but cluster.num_workers is {workers}; "
            f"set parallel.dp or use {parallel.world_size} workers."
        )


def check_section(section: Any, source: str) -> None:
    """Raise ConfigError or LayoutError for keys of one section that do not go together."""
    tree = section.model_dump() if isinstance(section, BaseModel) else section
    _check_text(tree, source)
    name = next((name for name, field in Config.model_fields.items() if field.annotation is type(section)), "run_dir")
    check_names({name: tree}, source, "leave it out, and rename a folder or file that has it in its name", ConfigError)
    check = _CHECKS.get(type(section))
    if check is not None:
        check(section, source)


def _check_model(model: ModelConfig, source: str) -> None:
    if model.quantization is not None and model.checkpoint is not None:
        raise ConfigError(
            f"{source}: model.quantization and model.checkpoint are given together, but a checkpoint's weights are "
            "read as they are; leave one of them out."
        )


def _check_random(config: Config, source: str) -> None:
    """Raise ConfigError for training on random tokens, from which there is nothing to learn."""
    if config.data.path == RANDOM_TOKENS and config.train.method != "none":
        raise ConfigError(
            f"{source}: train.method is {config.train.method}, but data.path {RANDOM_TOKENS} is for scoring alone; "
            "give data.path your data, or set train.method=none."
        )


def _check_placing(config: Config, source: str) -> None:
    """Raise ConfigError for weights that are to lie elsewhere in a run that needs them where it is."""
    keys = [key for key in ("device_map", "max_memory", "offload_folder") if getattr(config.model, key) is not None]
    if not keys:
        return
    named, parallel = f"{source}: model.{keys[0]} is given", config.parallel
    if parallel.backend != "transformers" or parallel.world_size > 1:
        raise ConfigError(
            f"{named}, which is for one process of parallel.backend transformers, but parallel is {parallel.backend} "
            f"with {parallel.world_size} ranks; leave one of the two out."
        )
    if config.train.method != "none":
        raise ConfigError(
            f"{named}, but train.method is {config.train.method}, which needs the whole model; set train.method=none, "
            "and train elsewhere with an export."
        )
    if config.model.checkpoint is not None:
        raise ConfigError(
            f"{named}, but model.checkpoint is read into memory; point model.name_or_path at the whole model instead."
        )
    if keys == ["offload_folder"]:
        raise ConfigError(f"{named} without model.max_memory or model.device_map, so that nothing is offloaded.")


def _check_parallel(parallel: ParallelConfig, source: str) -> None:
    if parallel.world_size > _MOST_RANKS:
        raise LayoutError(
            f"{source}: {parallel.layout.product_text} = {parallel.world_size} ranks, expected {_MOST_RANKS} at most; "
            "lower the sizes."
        )
    parallel.layout.validate()


def _check_data(data: DataConfig, source: str) -> None:
    given = [name for name in ("text_field", "template", "messages_field") if getattr(data, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"{source}: data.{' and data.'.join(given)} are given together; keep one of them.")
    if data.path == RANDOM_TOKENS and given:
        raise ConfigError(
            f"{source}: data.{given[0]} is given, but data.path {RANDOM_TOKENS} holds tokens and no text; leave it out."
        )


def _check_placement(placement: PlacementConfig, source: str) -> None:
    """Ask the policy itself, which may be of another package, for its options and parameters."""
    try:
        policy = load(POLICIES, placement.policy)
        if isinstance(policy, type) or not callable(getattr(policy, "rule", None)):
            raise ConfigError(
                f"policy '{placement.policy}' is {policy!r}, expected an instance of a subclass of "
                "plop_dist.choose.policy.Policy; tell its author."
            )
        if placement.match is not None and (policy.sets_rank or placement.rank_pattern):
            key = f"policy is {placement.policy}, which" if policy.sets_rank else "rank_pattern is given, which"
            raise ConfigError(
                f"{source}: placement.match is {placement.match}, but placement.{key} sets ranks by itself; keep one "
                "of the two."
            )
        unknown = [key for key in placement.options if key not in policy.options]
        if unknown:
            takes = (
                suggest(unknown[0], policy.options) if policy.options else "It takes none: set placement.options={}."
            )
            raise ConfigError(f"placement.options: '{unknown[0]}' is no option of policy '{policy.name}'. {takes}")
        policy.check(placement)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_train(train: TrainConfig, source: str) -> None:
    # Whether module:function can be imported is a question to the nodes that train.
    seen = set()
    if not train.rewards:
        raise ConfigError(f"{source}: train.rewards is empty; name at least one, e.g. [builtin:number].")
    for name in train.rewards:
        module, _, attribute = name.rpartition(":")
        if name not in REWARDS.own and (not (module and attribute) or module == "builtin"):
            known = names(REWARDS)
            if module == "builtin":
                raise ConfigError(f"{source}: train.rewards: unknown reward '{name}'. {suggest(name, known)}")
            if name not in known:
                expected = ", ".join(known)
                raise ConfigError(f"{source}: train.rewards: '{name}' is neither {expected} nor module:function.")
        if attribute in seen:
            raise ConfigError(f"{source}: train.rewards: '{name}': a reward '{attribute}' is in the list already.")
        seen.add(attribute)


_CHECKS: dict[type[BaseModel], Callable[[Any, str], None]] = {
    ModelConfig: _check_model,
    DataConfig: _check_data,
    ParallelConfig: _check_parallel,
    PlacementConfig: _check_placement,
    TrainConfig: _check_train,
}


def _check_text(tree: Any, source: str) -> None:
    # Results name the model, the data and the policy's options, and could not be read again.
    if isinstance(tree, Mapping):
        tree = [*tree.keys(), *tree.values()]
    if isinstance(tree, list | tuple):
        for value in tree:
            _check_text(value, source)
    elif isinstance(tree, str):
        try:
            tree.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{source}: {tree!r} is not whole Unicode text; give it in UTF-8 (rename a folder or file that is not)."
            ) from None


def _check_references(config: Config, source: str) -> None:
    """Raise ConfigError for a text of the placement that is a reference: results are explained by it later."""
    names = [f"placement.{name}" for name in ("policy", "granularity", "fit")]
    for key, text in config.references.items():
        if key.startswith("placement") and key not in names and isinstance(config.value_of(key), str | dict | list):
            raise ConfigError(
                f"{source}: {key} is {text}, but what is placed is explained by it later, where that has no value; "
                f"write out what {key} is."
            )


def _check_secrets(config: Config, source: str) -> None:
    # The configuration is kept in the run directory, for all to read.
    for key, value in strings(config.stored()):
        is_reference, last = key in config.references, key.rpartition(".")[2]
        shown = re.sub(r"\$\{[^}]*\}+", "", value) if is_reference else value
        part = secret_part(shown, is_prose=holds_text(key))
        if names_secret(last) and value != last and not is_reference:
            part, value = f"the value of '{last}'", REDACTED
        if part is not None:
            raise ConfigError(
                f"{source}: {key} holds {part} ({without_secrets(value)}), which would stay in the run directory; give "
                "it through the environment (HF_TOKEN, ~/.netrc, or ${oc.env:NAME} in its place)."
            )
