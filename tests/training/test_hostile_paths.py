"""Paths in which a shell would find commands reach another trainer's launch.sh and command.txt as they are."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from tests.exporters.hostile import MARK, NAMES
from tests.fuzz.commands import run_here
from tests.models import save_tiny

# Several of them at once; the names one by one are rare.
TOGETHER = (
    f"$(touch {MARK})`touch {MARK}`", f"it's \"; touch {MARK}; '", "a b*?~#!%s\\ {x: [y]}, é=&@", "${HOME}\\${HOME}",
)  # fmt: skip
STAND_IN = """#!/bin/sh
printf '%s\\0' "$@"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "model")


@pytest.mark.parametrize("engine", ["verl", "nemo-rl"])
@pytest.mark.parametrize("name", TOGETHER)
def test_launch_files_get_hostile_paths_as_they_are(
    name: str, engine: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_name(name, engine, model, tmp_path, monkeypatch)


@pytest.mark.rare
@pytest.mark.parametrize("engine", ["verl", "nemo-rl"])
def test_every_hostile_name(engine: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(NAMES):
        (tmp_path / str(number)).mkdir()
        check_name(name, engine, model, tmp_path / str(number), monkeypatch)


def check_name(name: str, engine: str, model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand a run over whose model and run directory have this name, and run in a shell whatever came of it."""
    monkeypatch.chdir(directory)
    (directory / f"m{name}").symlink_to(model)
    tree = {
        "run_dir": str(directory / f"r{name}"),
        "model": {"name_or_path": str(directory / f"m{name}"), "dtype": "float32"},
        "data": {"path": "builtin:arithmetic", "num_samples": 4, "max_length": 32},
        "placement": {"k": 2, "rank": 4, "alpha": 8},
        "train": {
            "method": "grpo",
            "engine": engine,
            "answer_field": "number",
            "micro_batch_size": 4,
            "lr_scheduler": "constant",
        },
    }
    config = directory / f"c{name}.yaml"
    config.write_text(re.sub(r"(\\*)\$\{", r"\1\1\\${", yaml.safe_dump(tree, default_style="'")))  # no interpolation
    done = run_here(("run", str(config)))
    run_dir = Path(tree["run_dir"])
    if done.status == 2 and not name.isprintable():
        return  # a name with control characters is refused
    assert done.status == 0, done
    if engine == "verl":  # what its trainer leaves, and its converter is shown
        checkpoints = run_dir / "train" / engine / "checkpoints"
        checkpoints.mkdir()
        (checkpoints / "latest_checkpointed_iteration.txt").write_text("20\n")
    words = run_in_shell(f"sh {shlex.quote(str(run_dir / 'train' / engine / 'launch.sh'))}", directory)
    for path in (directory / f"m{name}", run_dir / "train" / engine):
        assert any(str(path) in as_hydra_reads(word) for word in words), (path, words)
    note = json.loads((run_dir / "train" / "summary.json").read_text())["note"]
    assert run_in_shell("sh " + note.partition("; run sh ")[2].rpartition(" where it is")[0], directory) == words
    command = (run_dir / "command.txt").read_text()
    assert run_in_shell(command, directory) == ["run", str(config)]


def run_in_shell(text: str, directory: Path) -> list[str]:
    """Return the arguments that the program gets which this text starts; asserts that nothing else ran."""
    programs = directory / "programs"
    programs.mkdir(exist_ok=True)
    for program in ("python3", "python", "plop-dist", "uv"):
        (programs / program).write_text(STAND_IN)
        (programs / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", text], cwd=directory, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b""), text
    assert not (directory / MARK).exists(), text
    return done.stdout.decode().split("\0")[:-1]


def as_hydra_reads(word: str) -> str:
    """Return a quoted value of an override as Hydra and OmegaConf read it, or the word where it is none."""
    _, _, value = word.partition("=")
    if not value.startswith('"'):
        return word
    text, at, inner = "", 0, value[1:-1]
    while at < len(inner):
        run = len(inner[at:]) - len(inner[at:].lstrip("\\"))
        after = inner[at + run : at + run + 1]
        if run and after in ('"', ""):  # backslashes count before a quote alone
            text += "\\" * (run // 2) + after
        else:
            text += "\\" * run + after
        at += run + 1
    return str(OmegaConf.create({"text": text}).text)
