"""Who installed the wheel needs no checkout: `init --demo` works in an empty directory, and what follows it too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

from plop_dist import cli

CHECKOUT = Path(cli.__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]


def call(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: in the checkout what an earlier build left would get into it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(CHECKOUT / "plop_dist", source / "plop_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source / name)
    call(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", output, source)
    return next(output.glob("plop_dist-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {
        str(path.relative_to(CHECKOUT))
        for path in (CHECKOUT / "plop_dist").rglob("*")
        if path.suffix in (".py", ".yaml", ".j2", ".typed")
    }
    assert here <= names, here - names
    assert not [name for name in names if not name.startswith(("plop_dist/", "plop_dist-"))]


@pytest.mark.slow
def test_the_demo_starts_in_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    """The environment has the wheel, and beside it only what this one has of other packages."""
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    call(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    call(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(site, "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = call(python, "-c", "import plop_dist; print(plop_dist.__file__)", cwd=empty, env=variables).stdout
    assert where.startswith(site)
    program = environment / "bin" / "plop-dist"
    assert call(program, "init", "--demo", cwd=empty, env=variables).stdout == "quickstart.yaml\n"
    planned = call(program, "check", "quickstart.yaml", cwd=empty, env=variables).stdout
    assert "Ranks: 2" in planned
    assert os.listdir(empty) == ["quickstart.yaml"]
