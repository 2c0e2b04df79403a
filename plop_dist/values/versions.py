"""Which versions of the relevant packages are installed, read from their metadata without importing them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "plop-dist",
    "torch",
    "transformers",
    "peft",
    "trl",
    "ray",
    "deepspeed",
    "megatron-core",
    "megatron-bridge",
)


def versions() -> dict[str, str]:
    """Return package -> version for those that are installed, and Python's own."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
