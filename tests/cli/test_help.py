"""Help speaks to the one who runs a command: what it does, with examples that work, at once; shells complete it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from plop_dist import cli
from plop_dist.config.reference import sections
from plop_dist.registry import EXPORTERS, names
from tests.cli.cases import plop_dist

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
ROOT = Path(cli.__file__).parents[2]


def examples(name: str) -> list[list[str]]:
    """Return the command lines in a command's help."""
    found = re.findall(r"^    (.*plop.dist.*)$", COMMANDS[name].help, re.MULTILINE)
    return [shlex.split(re.split(r" [|>] ", line)[0], comments=True) for line in found]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_does_with_examples_that_can_be_typed(name: str) -> None:
    shown = plop_dist(name, "--help")
    assert shown.status == 0
    assert examples(name), "no example"
    own = [words[words.index(name) + 1 :] for words in examples(name) if name in words]
    assert len(own) == len(examples(name)), "an example of another command"
    keys = {key.name for section in sections() for key in section.keys} | {
        key.field for section in sections() if section.name == "placement" for key in section.keys
    }
    for arguments in own:
        context = COMMANDS[name].make_context(name, [*arguments])
        given = context.params.get("overrides") or ()
        assert all(item.partition("=")[0] in keys for item in given), given
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{parameter.name} says nothing"


@pytest.mark.parametrize("name", COMMANDS)
def test_lines_of_examples_are_not_folded_on_a_narrow_terminal(name: str) -> None:
    printed = plop_dist(name, "--help").out
    for line in re.findall(r"^    (.*plop.dist.*)$", COMMANDS[name].help, re.MULTILINE):
        assert line in printed


def test_the_first_page_speaks_to_users_and_names_groups_and_exit_statuses() -> None:
    page = plop_dist("--help").out
    assert "thin" not in page
    assert all(f" {word} " in page for word in ("Prepare", "Step by step", "All at once", "Look up"))
    assert all(name in page for name in COMMANDS)
    assert re.search(r"Exit status: 0 done; 1 failed while running; 2 bad input", page)


@pytest.mark.slow
def test_help_comes_at_once() -> None:
    """Typer alone: neither torch nor pydantic, which take longer than anyone's patience with --help."""
    code = """
import sys, time
before = time.process_time()
sys.argv = ["plop-dist", "--help"]
from plop_dist.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code
print(time.process_time() - before, file=sys.stderr)
heavy = {"torch", "transformers", "numpy", "pydantic", "omegaconf", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stderr))
    assert min(seconds) < 0.5


@pytest.mark.slow
def test_the_command_line_runs_as_a_module_and_as_a_folder() -> None:
    """As a folder it comes first on the path, where no module may hide one of the standard library."""
    for way in (["-m", "plop_dist.cli"], [str(ROOT / "plop_dist" / "cli")]):
        command = [sys.executable, *way, "place", "nowhere"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "run plop-dist score first" in done.stderr
    folders = (ROOT / "plop_dist", ROOT / "plop_dist" / "cli")
    here = {path.stem for folder in folders for path in folder.iterdir() if not path.name.startswith("_")}
    assert not here & set(sys.stdlib_module_names)


def complete(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """Return what bash offers for the last word."""
    monkeypatch.setenv("_PLOP_DIST_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(["plop-dist", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    outcome = plop_dist()
    assert outcome.status == 0, outcome.err
    return outcome.out.split()


def test_targets_keys_policies_and_run_directories_are_completed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/gsm8k", "runs/other", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / "gsm8k" / "scores.json").touch()
    assert tuple(complete(monkeypatch, "export", "runs/gsm8k", "--to", "")) == names(EXPORTERS)
    assert complete(monkeypatch, "export", "runs/gsm8k", "--to", "torch") == ["torchtune", "torchtitan"]
    assert complete(monkeypatch, "export", "") == ["runs/gsm8k"]
    assert complete(monkeypatch, "place", "runs/") == ["runs/gsm8k"]
    assert complete(monkeypatch, "place", "runs/gsm8k", "pol") == ["policy="]
    assert complete(monkeypatch, "place", "runs/gsm8k", "policy=low") == ["policy=lowest_k"]
    assert complete(monkeypatch, "check", "a.yaml", "parallel.back") == ["parallel.backend="]
    assert complete(monkeypatch, "check", "a.yaml", "parallel.backend=m") == ["parallel.backend=megatron"]
    assert set(complete(monkeypatch, "s")) == {"score", "submit", "schema"}


def test_the_script_that_install_completion_installs_works_in_bash(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("plop-dist")
    if not program.exists():
        pytest.skip(f"plop-dist is not installed beside {sys.executable}")
    home = {"HOME": str(tmp_path), "PATH": f"{program.parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    # Typer asks which shell has started it: one that waits for it.
    command = ["bash", "-c", "plop-dist --install-completion bash; exit $?"]
    installed = subprocess.run(command, env=home, capture_output=True, text=True, timeout=60)
    assert installed.returncode == 0, installed.stderr
    script = """
        source ~/.bashrc
        COMP_WORDS=(plop-dist export runs/x --to meg); COMP_CWORD=4
        _plop_dist_completion plop-dist
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", script], env=home, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["megatron-bridge", "megatron-swift"], done.stderr


def test_wrong_usage_says_where_help_is() -> None:
    outcome = plop_dist("plase", "runs/x")
    assert outcome.status == 2
    assert "Did you mean 'place'?" in outcome.err
