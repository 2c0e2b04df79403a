"""Which keys of the configuration go together, beyond what each of them allows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from plop_dist.errors import ConfigError, suggest
from plop_dist.registry import EXPORTERS, names

if TYPE_CHECKING:
    from plop_dist.config.schema import Config

_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_REWARDS = ("number", "format")


def check_consistency(config: Config, source: str) -> None:
    """Raise ConfigError or LayoutError for keys that do not go together; `source` is named in it."""
    _check_secrets(config.model_dump(), source)
    parallel, placement, data = config.parallel, config.placement, config.data
    parallel.layout.validate()
    workers = config.cluster.num_workers
    if workers is not None and workers != parallel.world_size:
        raise ConfigError(
            f"{source}: {parallel.layout.product_text} = {parallel.world_size}, but cluster.num_workers is {workers}; "
            f"set parallel.dp or use {parallel.world_size} workers."
        )
    if parallel.backend != "deepspeed" and parallel.zero_stage:
        raise ConfigError(
            f"{source}: parallel.zero_stage is {parallel.zero_stage}, but parallel.backend is '{parallel.backend}'; "
            "ZeRO is DeepSpeed's: set parallel.backend=deepspeed or parallel.zero_stage=0."
        )
    if parallel.sequence_parallel and (parallel.backend != "megatron" or parallel.tp == 1):
        raise ConfigError(
            f"{source}: parallel.sequence_parallel is true with parallel.backend '{parallel.backend}' and parallel.tp "
            f"{parallel.tp}; it needs parallel.backend=megatron and parallel.tp of 2 or more."
        )
    if parallel.backend != "megatron" and (parallel.cp > 1 or parallel.ep > 1):
        raise ConfigError(
            f"{source}: parallel.cp is {parallel.cp} and parallel.ep is {parallel.ep}, but only parallel.backend="
            f"megatron shards context or experts, not '{parallel.backend}'."
        )
    if parallel.backend == "transformers" and parallel.pp > 1:
        raise ConfigError(
            f"{source}: parallel.pp is {parallel.pp}, but parallel.backend 'transformers' has no pipeline; use "
            "parallel.backend=deepspeed or megatron."
        )
    if parallel.backend == "deepspeed" and (
        (parallel.zero_stage > 1 and (parallel.tp > 1 or parallel.pp > 1)) or (parallel.tp > 1 and parallel.pp > 1)
    ):
        raise ConfigError(
            f"{source}: parallel.backend deepspeed cannot combine tp {parallel.tp}, pp {parallel.pp} and zero_stage "
            f"{parallel.zero_stage}; use one of tp and pp, with zero_stage 0 or 1."
        )
    for target in config.export.targets:
        if target not in names(EXPORTERS):
            known = suggest(target, names(EXPORTERS))
            raise ConfigError(f"{source}: export.targets: unknown target '{target}'. {known}")
    _check_rewards(config.train.rewards, source)
    given = [name for name in ("text_field", "template", "messages_field") if getattr(data, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"{source}: data.{' and data.'.join(given)} are given together; keep one of them.")
    if placement.policy == "threshold" and placement.threshold is None:
        raise ConfigError(f"{source}: placement.policy=threshold needs placement.threshold, e.g. 1.0.")
    if placement.policy == "budget" and placement.max_trainable_parameters is None:
        raise ConfigError(f"{source}: placement.policy=budget needs placement.max_trainable_parameters.")


def _check_secrets(section: Mapping[str, Any], source: str, prefix: str = "") -> None:
    # The configuration is kept in the run directory, for all to read.
    for key, value in section.items():
        if isinstance(value, Mapping):
            _check_secrets(value, source, f"{prefix}{key}.")
        elif isinstance(value, str) and _PASSWORD.search(value):
            raise ConfigError(
                f"{source}: {prefix}{key} holds a password ({_PASSWORD.sub('...', value)}), which would stay in the "
                "run directory; give it through the environment (HF_TOKEN, ~/.netrc) and leave it out of the URL."
            )


def _check_rewards(names: Sequence[str], source: str) -> None:
    # Whether module:function can be imported is a question to the nodes that train.
    seen = set()
    if not names:
        raise ConfigError(f"{source}: train.rewards is empty; name at least one, e.g. [builtin:number].")
    for name in names:
        module, _, attribute = name.partition(":")
        if not module or not attribute:
            raise ConfigError(
                f"{source}: train.rewards: '{name}' is neither builtin:number, builtin:format nor module:function."
            )
        if module == "builtin" and attribute not in _REWARDS:
            raise ConfigError(f"{source}: train.rewards: unknown reward '{name}'. {suggest(attribute, _REWARDS)}")
        if attribute in seen:
            raise ConfigError(f"{source}: train.rewards: '{name}': a reward '{attribute}' is in the list already.")
        seen.add(attribute)
