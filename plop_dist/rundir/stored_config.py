"""The configuration that a run directory keeps beside its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from plop_dist.config.loading import parse_section, split_override, stored_section
from plop_dist.config.references import check_followed
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import RunDirError
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.stages import Stages
from plop_dist.values.files import content_hash, write_text, write_together
from plop_dist.values.secret_texts import without_secrets


def placement_config(run_dir: RunDir, overrides: Sequence[str]) -> PlacementConfig:
    """Return the policy: defaults, then the run's own section, then overrides (`k=2` or `placement.k=2`).

    References (`${oc.env:X}`) of the run's own section are not followed. Raises ConfigError for one that no override
    replaces, an unknown key or a bad value.
    """
    section, references = stored_section(run_dir.config, "placement") if run_dir.config.is_file() else ({}, {})
    for override in overrides:
        key, value = split_override(override)
        name, _, below = key.removeprefix("placement.").partition(".")
        whole = section.get(name, {})
        # placement.options.share=0.3: one key of a mapping, beside those that are there
        section[name] = {**whole, below: value} if below and isinstance(whole, dict) else value
        given = f"placement.{key.removeprefix('placement.')}"
        references = {at: text for at, text in references.items() if at != given and not at.startswith(f"{given}.")}
    check_followed(references, str(run_dir.config))
    return parse_section(PlacementConfig, section, source=str(run_dir.path))


@contextmanager
def kept_config(stages: Stages, command: str) -> Iterator[None]:
    """Write the resolved configuration and the command that reproduces the run.

    A block that raises before any stage is done leaves those that belong to the results that are there.
    """
    run_dir = stages.run_dir
    files = (run_dir.config, run_dir.command)
    before = {path: path.read_bytes() for path in files if path.is_file()}
    results = (stages.done(), content_hash(run_dir.scores))
    write_text(run_dir.config, stages.config.stored_yaml())
    write_text(run_dir.command, without_secrets(command) + "\n")
    try:
        yield
    except BaseException:
        if results[0] and results == (stages.done(), content_hash(run_dir.scores)):
            with suppress(RunDirError):  # what is being raised says more
                write_together(before)
        raise
