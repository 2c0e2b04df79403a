"""The configuration that a run directory keeps beside its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from plop_dist.config.loading import load_config, parse_section, split_override
from plop_dist.config.schema import Config, PlacementConfig
from plop_dist.errors import RunDirError
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.stages import Stages
from plop_dist.values.files import content_hash, write_text, write_together


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
        name, _, below = key.removeprefix("placement.").partition(".")
        whole = section.get(name, {})
        # placement.options.share=0.3: one key of a mapping, beside those that are there
        section[name] = {**whole, below: value} if below and isinstance(whole, dict) else value
    return parse_section(PlacementConfig, section, source=str(run_dir.path))


@contextmanager
def kept_config(stages: Stages, command: str) -> Iterator[None]:
    """Write the resolved configuration and the command that reproduces the run.

    A block that raises before any stage is done leaves those that belong to the results that are there.
    """
    from omegaconf import OmegaConf

    run_dir = stages.run_dir
    files = (run_dir.config, run_dir.command)
    before = {path: path.read_bytes() for path in files if path.is_file()}
    results = (stages.done(), content_hash(run_dir.scores))
    write_text(run_dir.config, OmegaConf.to_yaml(OmegaConf.create(stages.config.model_dump(mode="json"))))
    write_text(run_dir.command, command + "\n")
    try:
        yield
    except BaseException:
        if results[0] and results == (stages.done(), content_hash(run_dir.scores)):
            with suppress(RunDirError):  # what is being raised says more
                write_together(before)
        raise
