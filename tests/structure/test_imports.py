"""Imports point one way, each framework is imported only where it is used, and the package itself imports none."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import plop_dist

ROOT = Path(plop_dist.__file__).parent

# Where a framework may be imported: files, or folders with a closing slash.
HOMES = {
    "ray": ("launch/", "training/external/skyrl_job.py"),
    "deepspeed": ("backends/", "training/", "exporters/deepspeed.py"),
    "megatron": (
        "backends/megatron/",
        "training/engines/megatron.py",
        "training/adapters/megatron_chunks.py",
        "training/adapters/on_megatron.py",
        "plugin/bridge_peft.py",
        "exporters/megatron_bridge.py",
        "canonical_lora.py",
    ),
    "peft": ("training/", "exporters/peft.py", "exporters/peft_match.py"),
    "trl": ("training/trl/",),
}
ALWAYS_LAZY = {"deepspeed", "megatron", "peft", "trl"}
ON_USE = (
    "canonical_lora.py",
    "plugin/bridge_peft.py",
    "training/trl/grpo.py",
    "training/trl/sft.py",
)  # are themselves imported only on use


def files() -> dict[str, Path]:
    """Return every module of the package by its dotted name below plop_dist; a sample script is none of them."""
    found = {}
    for path in sorted(set(ROOT.rglob("*.py")) - set(ROOT.glob("config/samples/*"))):
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


# A folder answers one question; what is no folder stands above all of them or below.
ROOMS = (
    "cli", "launch", "report", "compare", "plugin", "costs", "training", "data", "backends", "measure", "choose",
    "rundir", "ranks", "config", "exporters", "values", "canonical_lora", "checkpoints", "registry", "errors",
)  # fmt: skip


def levels() -> dict[str, int]:
    """Return how deep each room lies, from import-linter's layers in pyproject.toml."""
    settings = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["importlinter"]
    rows = [row.split("|") for row in settings["contracts"][0]["layers"]]
    return {name.strip().removeprefix("plop_dist."): depth for depth, row in enumerate(rows) for name in row}


def test_every_room_has_its_place() -> None:
    """pyproject.toml's layers name them all: import-linter passes over a folder that it is not told of."""
    level = levels()
    known, upward, num_found = files(), [], 0
    for name, path in known.items():
        if name in ("", "registry"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            match = re.fullmatch(r"plop_dist((?:\.\w+)+)\.?(?::\w*)?", node.value)
            if match is None or " " in node.value:
                continue
            num_found += 1
            own, target = name.split(".")[0], match[1].split(".")[1]
            if target in level and level[target] < level[own]:
                upward.append(f"{name} names {node.value}")
    assert upward == []
    assert num_found


def imported_files() -> dict[str, set[str]]:
    """Return which files each file imports, at its top or in a function, by dotted names below plop_dist."""
    known = files()
    graph = {}
    for name, path in known.items():
        targets = {target.removeprefix("plop_dist.") for target, _ in imports(path) if target.startswith("plop_dist.")}
        graph[name] = {target if target in known else target.rpartition(".")[0] for target in targets} & known.keys()
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return one circle of a graph, [] if it has none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        found = next(filter(None, (walk(target, [*path, name]) for target in sorted(graph[name]))), [])
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in sorted(graph))), [])


def test_no_circle_of_imports_lazy_ones_included() -> None:
    """import-linter knows folders; within one, a circle makes two files one, whatever their names say."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    graph = imported_files()
    assert {"backends.hf.whole", "measure.protocols"} <= graph["backends.hf.backend"] | graph["backends.hf.whole"]
    assert circle(graph) == []


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
            if not is_lazy and framework in ALWAYS_LAZY and place not in ON_USE:
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
import plop_dist.cli, plop_dist.config.schema, plop_dist.registry, plop_dist.exporters
for name in plop_dist.registry.names(plop_dist.registry.BACKENDS):
    plop_dist.registry.load(plop_dist.registry.BACKENDS, name)
assert not loaded(), loaded()
for module in pkgutil.iter_modules(plop_dist.exporters.__path__):
    importlib.import_module("plop_dist.exporters." + module.name)
assert not loaded(), loaded()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
