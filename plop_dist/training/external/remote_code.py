"""Whether a checkpoint brings code along, for engines that run such code whatever they are told."""

from __future__ import annotations

from typing import Any

from plop_dist.checkpoints.builtin import resolve
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError


def check_remote_code(config: Config, name: str) -> None:
    """Raise ConfigError unless model.trust_remote_code is true or the checkpoint names no code of its own."""
    if config.model.trust_remote_code:
        return
    path = resolve(config.model.name_or_path)
    for file, tree in _configurations(path).items():
        if tree.get("auto_map"):
            raise ConfigError(
                f"train.engine '{name}' runs Python code that comes with a checkpoint without asking, and {file} of "
                f"'{path}' names some (auto_map), but model.trust_remote_code is false; set it to true if you trust "
                "that code, or use another engine."
            )


def _configurations(path: str) -> dict[str, dict[str, Any]]:
    from transformers import PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        return {
            "config.json": PretrainedConfig.get_config_dict(path)[0],
            "tokenizer_config.json": get_tokenizer_config(path),
        }
    except (OSError, ValueError):
        return {}  # loading the model has said, or will say, what is wrong with it
