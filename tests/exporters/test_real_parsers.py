"""Placement -> the real parsers and trainers of frameworks that are no dependency of this project.

`make test` installs each into .cache/parsers/NAME, apart from .venv and from the others (tests/parsers/NAME.txt). A
framework that is there must read the export and adapt exactly the placement; one that could not be installed is skipped
and says so. tests/parser_checks.py says what is compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".cache" / "parsers"
PARSERS = sorted(path.stem for path in (ROOT / "tests" / "parsers").glob("*.txt"))


def is_installed(name: str) -> bool:
    return (INSTALLED / name / ".installed").is_file()


def check(name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.exporters.parser_checks", name, str(INSTALLED / name)]
    # torchtune needs an older torchao than .venv has; no other framework brings what is there as well.
    path = {"PYTHONPATH": str(INSTALLED / name)} if name == "torchtune" else {}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **path})


@pytest.fixture(scope="module")
def outcomes():
    # Most of their time goes into imports: two at once.
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(check, name) for name in PARSERS if is_installed(name)}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_the_framework_adapts_what_is_exported(name, outcomes):
    if name not in outcomes:
        pytest.skip(f"{name} is not installed in .cache/parsers: `make test` does that where it has a network")
    if name == "axolotl" and sys.version_info < (3, 12):
        pytest.skip("axolotl needs Python 3.12")
    done = outcomes[name].result()
    assert done.returncode == 0, f"{name}:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"


def test_every_framework_has_a_check():
    from tests.exporters.parser_checks import CHECKS

    assert sorted(CHECKS) == PARSERS
