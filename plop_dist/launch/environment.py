"""Which variables of this environment the workers get, and by which way: what is secret goes with the function."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError
from plop_dist.values.secret_texts import names_secret, secret_part

# GLOO_* and NCCL_*: how ranks reach each other; HF_*: where models come from; WANDB_*, MLFLOW_*: where logs go.
FORWARDED = (
    "OMP_NUM_THREADS", "PLOP_DIST_CACHE", "TORCH_EXTENSIONS_DIR", "PYTHONPATH", "GLOO_*", "NCCL_*", "HF_*", "WANDB_*",
    "MLFLOW_*", "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "ALL_PROXY",
)  # fmt: skip


def worker_environment(config: Config) -> dict[str, str]:
    """Return the workers' variables that all may see: threads as many as cores granted, caches, what is forwarded.

    Raises ConfigError for a name in cluster.env that is not set here.
    """
    variables = {
        "OMP_NUM_THREADS": str(max(1, int(config.cluster.cpus_per_worker))),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if "PLOP_DIST_CACHE" in os.environ:
        # Compiling DeepSpeed's extension takes minutes; without this torch keeps it in the user's own cache.
        variables["TORCH_EXTENSIONS_DIR"] = str(Path(os.environ["PLOP_DIST_CACHE"]) / "torch_extensions")
    return variables | {name: os.environ[name] for name in _names(config) if not _is_secret(name)}


def worker_secrets(config: Config) -> dict[str, str]:
    """Return the variables that nobody else may see: tokens, keys, addresses that hold a password.

    They reach the workers beside their function: Ray shows a runtime environment, and keeps it in its logs. Raises
    ConfigError as worker_environment does.
    """
    return {name: os.environ[name] for name in _names(config) if _is_secret(name)}


def lines_for_ssh() -> str:
    """Return NAME=VALUE lines, quoted for a shell, of what ranks need that are started through ssh; no secrets.

    DeepSpeed's launcher puts them into command lines, which everybody on a host can read.
    """
    names = [name for name in os.environ if name in ("PATH", "LD_LIBRARY_PATH") or _is_forwarded(name)]
    shown = {name: os.environ[name] for name in names if not _is_secret(name) and "\n" not in os.environ[name]}
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in shown.items())


def _names(config: Config) -> Iterator[str]:
    missing = [name for name in config.cluster.env if name not in os.environ]
    if missing:
        raise ConfigError(
            f"cluster.env names {', '.join(missing)}, not set in this environment; set it, or take the name out."
        )
    for name in os.environ:
        if name in config.cluster.env or _is_forwarded(name):
            yield name


def _is_forwarded(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in FORWARDED)


def _is_secret(name: str) -> bool:
    return names_secret(name) or secret_part(os.environ[name]) is not None
