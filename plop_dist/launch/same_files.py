"""Does every rank see the run directory, the model and the data that others see? Asked before anything is loaded."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from plop_dist import ranks
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, RunDirError
from plop_dist.rundir.stages import Stages
from plop_dist.rundir.taken import mark_of

PATHS = ("model.name_or_path", "model.checkpoint", "data.path", "train.data_path", "train.eval_path")
_NFS_WAIT_S = 5.0  # a network's file system shows some moments later what another host has written


@dataclass(frozen=True)
class Seen:
    """What one process sees: the mark in the run directory of who writes into it, and which paths are there."""

    host: str
    mark: str | None
    paths: Mapping[str, bool]


def seen_here(stages: Stages, mark: str | None = None) -> Seen:
    """Return what this process sees, after a moment if the run directory does not have this mark yet."""
    until = time.monotonic() + _NFS_WAIT_S
    while (found := mark_of(stages.run_dir.path)) != mark and mark is not None and time.monotonic() < until:
        time.sleep(0.2)
    there = {key: os.path.exists(value) for key in PATHS if (value := _value(stages.config, key)) is not None}
    return Seen(socket.gethostname(), found, there)


def check_same_files(stages: Stages, first: Seen | None = None) -> list[str]:
    """Check that all ranks see the same files, and return the host of each rank. Collective over the world.

    first: what the driver sees; None: what rank 0 does. Raises RunDirError or ConfigError, on every rank alike, naming
    hosts and paths. A path that nobody sees may be a name on a hub: who loads it finds out.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [socket.gethostname()]
    first = ranks.agree(lambda: seen_here(stages)) if first is None else first
    everyone: list[Seen] = [first] * dist.get_world_size()
    dist.all_gather_object(everyone, seen_here(stages, first.mark))
    apart = [(rank, seen.host) for rank, seen in enumerate(everyone) if first.mark not in (None, seen.mark)]
    if apart:
        raise RunDirError(
            f"run_dir '{stages.run_dir.path}' on {_hosts(apart)} is not the folder that {first.host} writes into: "
            "results would be in pieces; choose a run_dir on storage that all hosts share."
        )
    for key in PATHS:
        has = [seen.host for seen in (first, *everyone) if seen.paths.get(key)]
        lacks = [(rank, seen.host) for rank, seen in enumerate(everyone) if seen.paths.get(key) is False]
        if has and lacks:
            raise ConfigError(
                f"{key} '{_value(stages.config, key)}' is on {', '.join(dict.fromkeys(has))}, but not on "
                f"{_hosts(lacks)}; put it at the same path on every host, or on storage that all of them share."
            )
    return [seen.host for seen in everyone]


def _value(config: Config, key: str) -> str | None:
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    return value if isinstance(value, str) and value else None


def _hosts(found: list[tuple[int, str]]) -> str:
    """Return hosts with their ranks, as people say them."""
    by_host: dict[str, list[int]] = {}
    for rank, host in found:
        by_host.setdefault(host, []).append(rank)
    return ", ".join(
        f"{host} (rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))})"
        for host, numbers in by_host.items()
    )


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with local paths made absolute: workers run in other directories."""
    values = {key: _value(config, key) for key in PATHS}
    updates: dict[str, dict[str, str]] = {}
    for key, value in values.items():
        if value is not None and Path(value).exists():
            section, _, name = key.partition(".")
            updates.setdefault(section, {})[name] = str(Path(value).resolve())
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in updates.items()}
    arms = [str(Path(arm).resolve()) if arm.endswith(".json") else arm for arm in config.compare.arms]
    sections["compare"] = config.compare.model_copy(update={"arms": arms})
    return config.model_copy(update={"run_dir": str(Path(config.run_dir).resolve()), **sections})
