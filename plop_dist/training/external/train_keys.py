"""Which keys of the train section an engine takes: whatever it does not take is refused by name, never dropped.

An engine names what it takes; a key that joins the schema later is refused until it says what it does with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from plop_dist.config.schema import Config, TrainConfig
from plop_dist.errors import ConfigError

# What decides about the rows and who trains, which is done before an engine sees anything.
SHARED = frozenset(
    {"method", "engine", "engine_python", "data_path", "eval_path", "eval_samples", "prompt_template", "answer_field"}
)

_REASONS: Mapping[str, str] = {
    "packing": "GRPO has nothing to pack",
    "track_nfn_every": "the adapted model is not where it could be scored",
    "use_vllm": "it generates with vLLM by itself",
}


def check_keys(config: Config, name: str, takes: Collection[str], reasons: Mapping[str, str]) -> None:
    """Raise ConfigError for a key of `train` that is given and that the engine has no word for.

    takes: the keys for which it has one; reasons: why others have none, by key.
    """
    reasons = {**_REASONS, **reasons}
    for key, field in TrainConfig.model_fields.items():
        value, default = getattr(config.train, key), field.get_default(call_default_factory=True)
        if key in SHARED or key in takes or value == default:
            continue
        reason = f" ({reasons[key]})" if key in reasons else ""
        raise ConfigError(
            f"train.{key} is {_shown(value)}, but train.engine '{name}' takes no such key{reason}; leave it at "
            f"{_shown(default)}, or use another engine."
        )


def refuse(config: Config, name: str, key: str, why: str) -> None:
    """Raise ConfigError for a dotted key whose value an engine has no word for; why: what it has, and what to do."""
    raise ConfigError(f"{key} is {_shown(config.value_of(key))}, but train.engine '{name}' {why}.")


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
