"""What the Python of an engine has: its version, the packages that the engine needs, and which of them are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, first_line

_PROBE_WAIT_S = 120
# Packages are looked for, not imported: some take minutes, or need a GPU.
_PROBE = """
import importlib.metadata as metadata, importlib.util as util, json, platform, sys
found = {}
for name in sys.argv[1:]:
    spec = util.find_spec(name)
    if spec is None:
        continue
    try:
        version = metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        version = None
    places = list(spec.submodule_search_locations or []) or [spec.origin]
    found[name] = {"version": version, "place": places[0]}
print("found: " + json.dumps({"python": platform.python_version(), "packages": found}))
"""


@dataclass(frozen=True)
class Interpreter:
    """One Python. places, versions: of the packages that were found, by name; missing: those that were not."""

    path: str
    python: str
    versions: dict[str, str | None]
    places: dict[str, Path]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        known = ", ".join(f"{name} {version or '(no version)'}" for name, version in self.versions.items())
        return f"{self.path} (Python {self.python}{', ' + known if known else ''})"


def interpreter_of(config: Config, packages: Sequence[str]) -> Interpreter:
    """Ask train.engine_python, or without one this Python, for packages by their import names.

    Raises ConfigError for one that does not run.
    """
    given = config.train.engine_python
    path = given or sys.executable
    try:
        done = subprocess.run(
            [path, "-c", _PROBE, *packages], capture_output=True, text=True, timeout=_PROBE_WAIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _does_not_run(path, first_line(error)) from error
    line = next((line for line in done.stdout.splitlines() if line.startswith("found: ")), None)
    if done.returncode or line is None:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise _does_not_run(path, lines[-1])
    tree = json.loads(line.removeprefix("found: "))
    found = tree["packages"]
    return Interpreter(
        path=path,
        python=tree["python"],
        versions={name: entry["version"] for name, entry in found.items()},
        places={name: Path(entry["place"]) for name, entry in found.items() if entry["place"]},
        missing=tuple(name for name in packages if name not in found),
    )


def _does_not_run(path: str, why: str) -> ConfigError:
    return ConfigError(
        f"train.engine_python '{path}' does not run as a Python interpreter ({why}); give the path of the `python` of "
        "the environment in which the engine is installed."
    )
