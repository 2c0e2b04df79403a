"""One command at a time writes into a run directory, and none that has ended stands in the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import plop_dist
from plop_dist.errors import RunDirError
from plop_dist.rundir import taken as home
from plop_dist.rundir.taken import TAKEN, taken
from tests.made_scores import made_scores

HOLD = """
import sys, time
from pathlib import Path
from plop_dist.rundir import taken as home
home._machine = lambda: sys.argv[2]
home.BEAT_S = 0.2
with home.taken(Path(sys.argv[1]), "run", makes=True):
    print("has it", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "BEAT_S", 0.2)
    monkeypatch.setattr(home, "WATCHED_WAIT_S", 1.5)


def holder(path: Path, machine: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), machine], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    return process


@pytest.mark.parametrize("machine", [home._machine(), "of another host"])
def test_a_second_one_names_the_first_and_nothing_stale_blocks(tmp_path: Path, machine: str) -> None:
    run_dir = tmp_path / "run"
    process = holder(run_dir, machine)
    try:
        for _ in range(2):
            with pytest.raises(RunDirError) as caught, taken(run_dir, "place"):
                pass
            assert f"is in use by plop-dist run (host {os.uname().nodename}, process {process.pid}, since 2" in str(
                caught.value
            )
    finally:
        process.kill()
        process.wait()
    assert (run_dir / TAKEN).exists(), "it was killed"
    began = time.monotonic()
    with taken(run_dir, "place"):
        assert json.loads((run_dir / TAKEN).read_text())["process"] == os.getpid()
    assert time.monotonic() - began < (1 if machine == home._machine() else 3)
    (run_dir / TAKEN).write_text(json.dumps({"machine": machine, "process": process.pid}))
    os.utime(run_dir / TAKEN, (time.time() - 60, time.time() - 60))
    began = time.monotonic()
    with taken(run_dir, "place"):
        pass
    assert time.monotonic() - began < 1, "the last sign of it is a minute old"
    assert list(run_dir.iterdir()) == []


def test_a_process_with_the_same_number_is_another_one(tmp_path: Path) -> None:
    with taken(tmp_path, "run"):
        content = json.loads((tmp_path / TAKEN).read_text())
    (tmp_path / TAKEN).write_text(json.dumps({**content, "began": "1"}))
    with taken(tmp_path, "run"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": "x"}', '{"process": 99999999999999999999999}'])
def test_what_is_no_such_file_is_passed_over(tmp_path: Path, content: str) -> None:
    (tmp_path / TAKEN).write_text(content)
    with taken(tmp_path, "run"):
        pass


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / TAKEN).symlink_to(tmp_path / "elsewhere")
    with taken(run_dir, "run"):
        pass
    assert (tmp_path / "elsewhere").read_text() == "{}"


def test_a_claim_that_is_gone_again_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / TAKEN).write_text(json.dumps({"process": 2**22 + 1, "machine": home._machine()}))
    others = [tmp_path / TAKEN]  # the file is there, and the first time another one's claim is too

    def linked(draft: Path, file: Path) -> bool:
        if file not in others:
            others.append(file)
            return False
        return link(draft, file)

    link = home._linked
    monkeypatch.setattr(home, "_linked", linked)
    began = time.monotonic()
    with taken(tmp_path, "run"):
        assert len(others) == 2
    assert time.monotonic() - began < 1


def test_what_is_gone_is_not_replaced(tmp_path: Path) -> None:
    """Somebody else may make it at the same moment, and would lose it."""
    assert not home._passed_over(tmp_path / TAKEN, home._own("run"))
    assert list(tmp_path.iterdir()) == []


def _try(path: Path, start: Any, results: Any, all_have_tried: Any) -> None:
    start.wait()
    try:
        with taken(path, "run"):
            results.put("has it")
            all_have_tried.wait(60)
    except RunDirError as error:
        results.put(str(error))


@pytest.mark.slow
def test_of_many_at_once_one_has_it(tmp_path: Path) -> None:
    (tmp_path / TAKEN).write_text(json.dumps({"process": 2**22 + 1, "machine": home._machine()}))
    context = multiprocessing.get_context("spawn")
    start, results, all_have_tried = context.Barrier(6), context.Queue(), context.Event()
    processes = [context.Process(target=_try, args=(tmp_path, start, results, all_have_tried)) for _ in range(6)]
    for process in processes:
        process.start()
    said = [results.get(timeout=60) for _ in processes]
    all_have_tried.set()
    for process in processes:
        process.join()
    assert said.count("has it") == 1
    assert sum("is in use by plop-dist run" in text for text in said) == 5


def test_every_command_that_writes_takes_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.cli.cases import plop_dist as command

    scores = made_scores()
    scores.to_file(tmp_path / "scores.json")
    plop_dist.place(scores, k=2).to_file(tmp_path / "placement.json")
    config = tmp_path / "c.yaml"
    config.write_text(f"run_dir: {tmp_path}\nmodel: {{name_or_path: none}}\ndata: {{path: 'builtin:arithmetic'}}\n")
    with taken(tmp_path, "run"):
        for arguments in (["place", tmp_path], ["export", tmp_path, "--to", "peft"], ["report", tmp_path],
                          ["score", config], ["run", config]):  # fmt: skip
            outcome = command(*arguments)
            assert outcome.status == 2, arguments
            assert "is in use by plop-dist run" in outcome.err
        assert command("place", tmp_path, "--dry-run").status == 0


def test_nothing_is_made_where_there_is_nothing(tmp_path: Path) -> None:
    from tests.cli.cases import plop_dist as command

    for arguments in (["report"], ["place"], ["export", "--to", "peft"]):
        outcome = command(arguments[0], tmp_path / "nowhere", *arguments[1:])
        assert outcome.status == 2
        assert "nowhere" in outcome.err
    assert not (tmp_path / "nowhere").exists()
