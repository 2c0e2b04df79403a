"""Imports point one way, each framework is imported only where it is used, and the package itself imports none."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import plop_dist

ROOT = Path(plop_dist.__file__).parent

# From the top to the bottom: a file imports from its own line and from those below it. A folder stands for its files.
LAYERS = (
    ("cli",),
    ("pipeline", "bench", "scaling"),
    ("cluster", "jobs"),
    ("worker", "plugin"),
    ("training",),
    ("plan",),
    ("backends",),
    ("export", "diff", "exporters", "canonical_lora"),
    ("report", "tables"),
    ("scoring",),
    ("explain", "sweep", "diagnostics", "select", "policies", "candidates"),
    (
        "bootstrap",
        "aggregate",
        "baseline",
        "collect",
        "note_storage",
        "reduce",
        "host_batches",
        "host_state",
        "data",
        "rows",
        "footprint",
    ),
    ("run_dir", "attempts", "stored_config", "progress", "events", "ranks", "parameters"),
    ("protocols",),
    (
        "registry",
        "norms",
        "names",
        "mesh",
        "config",
        "config_checks",
        "config_errors",
        "types",
        "placement",
        "files",
        "errors",
        "versions",
        "builtin_data",
        "builtin_model",
        "checkpoint_folder",
    ),
)
LEVEL = {name: -depth for depth, names in enumerate(LAYERS) for name in names}

# Where a framework may be imported: files, or folders with a closing slash.
HOMES = {
    "ray": ("cluster.py", "jobs.py"),
    "deepspeed": ("backends/", "training/", "exporters/deepspeed.py"),
    "megatron": ("backends/megatron", "training/megatron.py", "exporters/megatron_bridge.py", "canonical_lora.py"),
    "peft": ("training/", "exporters/peft.py", "exporters/peft_match.py"),
    "trl": ("training/",),
}
ALWAYS_LAZY = {"deepspeed", "megatron", "peft", "trl"}  # canonical_lora.py is itself imported only on use


def files() -> dict[str, Path]:
    """Return every module of the package by its dotted name below plop_dist."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Return the modules a file imports and whether on import, without what only type checkers read."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, is_lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, is_lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name} imports relatively"
                found.extend((f"{child.module}.{alias.name}", is_lazy) for alias in child.names)
            visit(child, is_lazy or isinstance(child, ast.FunctionDef))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def own_imports(*, lazy: bool = True) -> dict[str, set[str]]:
    """Return which modules of the package each module imports, at any time or only on import."""
    known = files()
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        graph[name] = set()
        for target, is_lazy in imports(path):
            if (lazy or not is_lazy) and target.split(".")[0] == "plop_dist":
                inner = target.removeprefix("plop_dist").removeprefix(".")
                while inner not in known:  # the last part is an attribute
                    inner = inner.rpartition(".")[0]
                graph[name].add(inner)
    return graph


def test_imports_point_downwards() -> None:
    upward = []
    for name, targets in own_imports().items():
        own = name.split(".")[0]
        if own == "":
            continue
        assert own in LEVEL, f"plop_dist/{own} has no place in LAYERS"
        upward += [f"{name} -> {target}" for target in targets if target and LEVEL[target.split(".")[0]] > LEVEL[own]]
    assert upward == []


def test_nothing_imports_itself_through_others() -> None:
    graph = {name: targets - {name, ""} for name, targets in own_imports(lazy=False).items()}
    graph["report"] = set()  # a package that re-exports its one public function
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


@pytest.mark.parametrize("framework", HOMES)
def test_a_framework_is_imported_only_at_home(framework: str) -> None:
    astray, eager, num_found = [], [], 0
    for path in files().values():
        place = path.relative_to(ROOT).as_posix()
        for target, is_lazy in imports(path):
            if target.split(".")[0] != framework:
                continue
            num_found += 1
            if not place.startswith(HOMES[framework]):
                astray.append(f"{place}: {target}")
            if not is_lazy and framework in ALWAYS_LAZY and place != "canonical_lora.py":
                eager.append(f"{place}: {target}")
    assert astray == []
    assert eager == []
    assert num_found


def test_importing_and_placing_loads_no_framework() -> None:
    frameworks = ["torch", "transformers", "ray", "deepspeed", "megatron", "trl", "peft", "accelerate", "datasets"]
    code = f"""
import importlib, pkgutil, sys
def loaded():
    return [name for name in {frameworks!r} if name in sys.modules]
import plop_dist
assert not loaded(), loaded()
plop_dist.place, plop_dist.Scores, plop_dist.Placement
import plop_dist.cli, plop_dist.config, plop_dist.registry, plop_dist.exporters
assert not loaded(), loaded()
for module in pkgutil.iter_modules(plop_dist.exporters.__path__):
    importlib.import_module("plop_dist.exporters." + module.name)
assert not loaded(), loaded()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
