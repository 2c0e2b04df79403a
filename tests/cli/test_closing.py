"""How commands end: trust warnings, what is outdated, files that open from here, and a next command that works."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.cli.cases import Outcome, plop_dist, write_case
from tests.models import save_tiny

TRAIN = {"method": "sft", "max_steps": 1, "eval_samples": 2, "micro_batch_size": 1, "max_length": 32}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a configuration whose run, training included, is done; and what that has said."""
    directory = tmp_path_factory.mktemp("closing")
    outcome = plop_dist("run", write_case(directory, save_tiny("llama", directory / "model"), train=TRAIN))
    assert outcome.status == 0, outcome.err
    (directory / "said.txt").write_text(f"{outcome.out}\0{outcome.err}")
    return directory


@pytest.fixture
def case(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run below the current directory, with a space in its path."""
    here = tmp_path / "my runs"
    shutil.copytree(finished / "run", here / "run")
    monkeypatch.chdir(here)
    return here


def next_command(outcome: Outcome) -> list[str]:
    """Return the arguments of the command that is printed as the next one."""
    program, *arguments = shlex.split(re.findall(r"^Next: (.+)$", outcome.err, re.MULTILINE)[-1])
    assert program == "plop-dist"
    return arguments


def test_a_run_ends_with_its_result_warnings_files_time_and_the_next_command(finished: Path) -> None:
    out, err = (finished / "said.txt").read_text().split("\0")
    assert "1.0 is its answer to random inputs of the same norm" in out
    assert "warning: Scored from fewer than 1,000 tokens" in out
    assert "Trained: sft · 1 steps" in out
    paths = [Path(line) for line in out.splitlines() if line.startswith("/")]
    assert [path.name for path in paths] == ["scores.json", "placement.json", "peft", "adapter", "report.html"]
    assert all(path.exists() for path in paths)
    assert re.search(r"^took [\d.]+ (s|min)", err, re.MULTILINE)


def test_the_next_command_of_each_step_can_be_pasted(finished: Path, case: Path) -> None:
    config = finished / "config.yaml"
    order = ["check", "run", "targets"]
    outcome = plop_dist("check", config, f"run_dir={case / 'run'}")
    for name in order[1:]:
        assert outcome.status == 0, outcome.err
        arguments = next_command(outcome)
        assert arguments[0] == name
        outcome = plop_dist(*arguments)
    assert outcome.status == 0, outcome.err
    outcome = plop_dist("score", config, f"run_dir={case / 'run'}")
    for name in ("place", "export", "report", "targets"):
        assert outcome.status == 0, outcome.err
        assert "warning: Scored from fewer than 1,000 tokens" in outcome.out or name not in ("place", "export")
        arguments = next_command(outcome)
        assert arguments[0] == name
        assert str(case / "run") in arguments
        outcome = plop_dist(*arguments)
    assert outcome.status == 0, outcome.err


@pytest.mark.slow
def test_what_was_made_from_an_older_placement_is_named_until_it_is_made_anew(case: Path) -> None:
    assert plop_dist("export", "run", "--to", "verl").status == 0
    same = plop_dist("place", "run")
    assert "older placement" not in same.out
    placed = plop_dist("place", "run", "k=2")
    assert "made from an older placement: exports/peft, exports/verl, train, report.html" in placed.out
    again = [shlex.split(line)[1:] for line in placed.out.splitlines() if line.startswith("  plop-dist ")]
    assert [arguments[0] for arguments in again] == ["export", "export", "run", "report"]
    outcome = Outcome(1, "", "")
    for arguments in again:
        outcome = plop_dist(*arguments)
        assert outcome.status == 0, outcome.err
    assert "older placement" not in outcome.out
    assert "older placement" not in plop_dist("place", "run", "k=2").out
    assert "made from an older placement" in plop_dist("place", "run", "k=1").out


def test_scores_that_have_become_others_name_what_was_made_from_those_before(finished: Path, case: Path) -> None:
    arguments = ["score", finished / "config.yaml", "run_dir=run"]
    assert "here before" not in plop_dist(*arguments).out, "the scores are the same"
    scored = plop_dist(*arguments, "data.num_samples=6")
    expected = "made from the scores that were here before: placement.json, exports/peft, train, report.html"
    assert expected in scored.out
    older = "placement.json was made from older scores"
    for command in (("export", "run", "--to", "peft"), ("report", "run"), ("export", "run", "--to", "peft", "--json")):
        assert older in plop_dist(*command).out, command
    assert older in Path("run/report.html").read_text()
    plop_dist("place", "run")
    for command in (("export", "run", "--to", "peft"), ("report", "run")):
        assert older not in plop_dist(*command).out, command
    assert older not in Path("run/report.html").read_text()


def test_a_dry_run_shows_the_choice_and_changes_nothing(case: Path) -> None:
    before = (case / "run" / "placement.json").read_bytes()
    tried = plop_dist("place", "run", "k=1", "--dry-run")
    assert tried.status == 0, tried.err
    assert re.search(r"^Chosen: \w+ · 2 modules", tried.out, re.MULTILINE)
    assert "stays as it was" in tried.out
    assert (case / "run" / "placement.json").read_bytes() == before
    assert "older placement" not in tried.out
    assert next_command(tried) == ["place", "run", "k=1"]


def test_paths_are_those_from_where_one_stands(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plop_dist("place", "run").out.splitlines()[-1] == "run/placement.json"
    assert plop_dist("place", case / "run").out.splitlines()[-1] == "run/placement.json"
    (case / "elsewhere").mkdir()
    monkeypatch.chdir(case / "elsewhere")
    assert plop_dist("place", "../run").out.splitlines()[-1] == str(case / "run" / "placement.json")
    assert "# ../" not in plop_dist("export", "../run", "--to", "verl").out
