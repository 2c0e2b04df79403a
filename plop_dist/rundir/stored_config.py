"""The placement section of a run directory's own configuration, with overrides laid over it."""

from __future__ import annotations

from collections.abc import Sequence

from plop_dist.config.loading import load_config, parse_section, split_override
from plop_dist.config.schema import Config, PlacementConfig
from plop_dist.rundir.layout import RunDir


def load_stored(run_dir: RunDir) -> Config | None:
    """Return the configuration that the run directory was made with, or None where only scores.json was put there."""
    return load_config(run_dir.config) if run_dir.config.is_file() else None


def placement_config(run_dir: RunDir, overrides: Sequence[str]) -> PlacementConfig:
    """Return the policy: defaults, then the run's own section, then overrides (`k=2` or `placement.k=2`).

    Raises ConfigError for an unknown key or a bad value.
    """
    stored = load_stored(run_dir)
    section = {} if stored is None else stored.placement.model_dump(mode="json")
    for override in overrides:
        key, value = split_override(override)
        section[key.removeprefix("placement.")] = value
    return parse_section(PlacementConfig, section, source=str(run_dir.path))
