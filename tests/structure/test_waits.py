"""Every wait of the code has its row in the table of waits, with its length: a wait is a key or a constant *_WAIT_S."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from plop_dist.config.schema import Config
from tests.structure.test_imports import ROOT

PAGE = ROOT.parent / "launchers" / "README.md"
_NAME = re.compile(r"_?[A-Z_]*WAIT_S$")
_SHORT_S = 4.0  # what takes less than some seconds need not be told


def rows() -> list[str]:
    """Return the rows of the table."""
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


def waits(source: str) -> Iterator[float]:
    """Yield the seconds of the constants *_WAIT_S of a module."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _NAME.match(node.targets[0].id):
            yield ast.literal_eval(node.value)


def nameless(source: str) -> list[int]:
    """Return the lines that wait for a number of seconds which has no name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = [keyword.value for keyword in node.keywords if keyword.arg in ("timeout", "timeout_s")]
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("wait", "join"):
                given += node.args
            values = [value.value for value in given if isinstance(value, ast.Constant)]
            found += [node.lineno for value in values if isinstance(value, (int, float)) and value > _SHORT_S]
    return found


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield the keys of the configuration that say how long something may take."""
    for name, field in schema.model_fields.items():  # type: ignore[attr-defined]
        if name.endswith("timeout_s"):
            yield prefix + name
        if hasattr(field.annotation, "model_fields"):
            yield from keys(field.annotation, f"{prefix}{name}.")


def test_every_wait_has_its_row() -> None:
    missing = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        for seconds in waits(path.read_text(encoding="utf-8")):
            if not any(f"`{place}`" in row and f"| {seconds:g} s" in row for row in rows()):
                missing.append(f"{place}: {seconds:g} s")
    assert missing == []


def test_every_key_that_limits_a_wait_has_its_row() -> None:
    found = sorted(keys(Config))
    assert "cluster.start_timeout_s" in found
    assert [key for key in found if not any(f"`{key}`" in row for row in rows())] == []


def test_no_wait_is_without_a_name() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): lines
        for path in ROOT.rglob("*.py")
        if (lines := nameless(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_what_is_missing_is_noticed() -> None:
    source = "_OTHER_WAIT_S = 10.0\nthread.join(9)\nget(timeout=30)\nget(timeout=_OTHER_WAIT_S)\n"
    assert list(waits(source)) == [10.0]
    assert nameless(source) == [2, 3]
