"""What each command prints, as recordings: in a pipe, on a terminal of 80 columns, and on one that can do nothing."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from plop_dist.cli import main
from tests.cli.cases import write_case
from tests.models import save_tiny

RECORDINGS = Path(__file__).with_name("recordings")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMANDS = {
    "check": ["check", "config.yaml"],
    "score": ["score", "config.yaml"],
    "place": ["place", "run", "--explain", "--sweep"],
    "export": ["export", "run", "--to", "verl"],
    "report": ["report", "run"],
    "run": ["run", "config.yaml"],
    "diff": ["diff", "run", "run/exports/peft/adapter_config.json"],
}
WAYS = {"pipe": (False, "xterm"), "terminal": (True, "xterm"), "dumb": (True, "dumb")}


class Screen(io.StringIO):
    """A stream that says of itself that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def finished() -> Iterator[Path]:
    """A directory with a configuration whose run is done."""
    # pytest's directories are numbered: where lines break would depend on how often it has run.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_case(directory, save_tiny("llama", directory / "model"))
        with contextlib.chdir(directory):
            assert say_all(["run", "config.yaml"], False)[0] == 0
        yield directory


def say_all(arguments: list[str], is_terminal: bool) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of a command in this process; only stdout may be a terminal."""
    out, err = Screen() if is_terminal else io.StringIO(), io.StringIO()
    command = mock.patch.object(sys, "argv", ["plop-dist", *arguments])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), command:
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def recorded(text: str, directory: Path) -> str:
    """Return what was printed without what differs from run to run: paths, times, digits, and lines that took long."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(str(directory), "DIR")
    text = re.sub(r"^took .+$", "took TIME", text, flags=re.MULTILINE)
    kept = [line for line in text.splitlines() if not re.search(r": [\d.]+ s( so far)?$", line)]
    kept = [line for line in kept if not (part := re.search(r": (\d+)/(\d+)", line)) or part[1] == part[2]]
    return "".join(re.sub(r"\d", "0", line).rstrip() + "\n" for line in kept)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_prints(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    is_terminal, terminal = WAYS[way]
    shutil.copytree(finished, tmp_path / "here")
    text = (tmp_path / "here" / "config.yaml").read_text().replace(str(finished), ".")
    (tmp_path / "here" / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", terminal)
    status, out, err = say_all(COMMANDS[name], is_terminal)
    assert status == 0, err
    said = f"{recorded(out, finished)}--- stderr\n{recorded(err, finished)}"
    path = RECORDINGS / f"{name}-{way}.txt"
    if os.environ.get("PLOP_DIST_RECORD"):
        path.write_text(said)
    assert said == path.read_text()
    if is_terminal:
        long = [line for line in recorded(out, finished).splitlines() if len(line) > 80]
        assert not [line for line in long if " " in line.strip() and "/" not in line and "=" not in line]


@pytest.mark.slow
def test_the_first_line_comes_within_a_second() -> None:
    """Of processor time: machines that are busy with other things take longer for everything."""
    code = """
import io, sys, time
class Stderr(io.StringIO):
    first = None
    def write(self, text):
        if self.first is None:
            self.first = (time.process_time(), text)
        return len(text)
stderr, sys.stderr = sys.stderr, Stderr()
sys.argv = ["plop-dist", sys.argv[1], "nowhere"]
from plop_dist.cli import main
try:
    main()
except SystemExit:
    pass
print(*sys.stderr.first, file=stderr)
"""
    for name in ("score", "place"):
        command = [sys.executable, "-c", code, name]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        seconds, text = done.stderr.split(" ", 1)
        assert text.startswith(f"plop-dist {name}: starting")
        assert float(seconds) < 1.0


@pytest.mark.slow
def test_libraries_talk_to_the_log_whatever_they_print_with(finished: Path, tmp_path: Path) -> None:
    """In a process of its own: Python's streams, logging, descriptors, C's buffers, a thread, a child, the very end."""
    code = """
import atexit, ctypes, logging, os, subprocess, sys, threading
sys.argv = ["plop-dist", "score", "config.yaml", *sys.argv[1:]]
from plop_dist.cli import main
import plop_dist.launch.rank as rank
load = rank.load_rows
def talk(*arguments):
    print("LIBRARY print")
    print("LIBRARY stderr", file=sys.stderr)
    logging.getLogger("a.library").error("LIBRARY logging")
    logging.getLogger("a.library").addHandler(logging.StreamHandler(sys.stdout))
    os.write(1, b"LIBRARY descriptor\\n")
    ctypes.CDLL(None).puts(b"LIBRARY C")
    thread = threading.Thread(target=print, args=("LIBRARY thread",))
    thread.start()
    thread.join()
    subprocess.run(["echo", "LIBRARY child"])
    atexit.register(lambda: logging.getLogger("a.library").error("LIBRARY end"))
    return load(*arguments)
rank.load_rows = talk
main()
"""
    shutil.copytree(finished, tmp_path / "here")

    def score(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "run_dir=new", *options]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, cwd=tmp_path / "here"
        )

    done = score()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("NFN per module type")
    assert "LIBRARY" not in done.stdout + done.stderr
    log = (tmp_path / "here" / "new" / "log.txt").read_text()
    for way in ("print", "stderr", "logging", "descriptor", "C", "thread", "child"):
        assert f"LIBRARY {way}\n" in log
    verbose = score("-v")
    assert verbose.stdout == done.stdout
    assert "LIBRARY descriptor\n" in verbose.stderr
    assert (tmp_path / "here" / "new" / "log.txt").read_text() == log


def test_quiet_leaves_results_and_another_log_can_be_named(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    status, out, err = say_all(["score", "config.yaml", "run_dir=new", "-q", "--log-file", "other.txt"], False)
    assert status == 0, err
    assert out.startswith("NFN per module type")
    assert err == ""
    assert Path("other.txt").is_file()
    assert not Path("new", "log.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["transformers", "deepspeed", "megatron"])
def test_nothing_of_a_library_is_on_stdout(finished: Path, tmp_path: Path, backend: str) -> None:
    pytest.importorskip({"megatron": "megatron.core"}.get(backend, backend))
    shutil.copytree(finished, tmp_path / "here")
    command = [
        sys.executable,
        "-m",
        "plop_dist.cli",
        "run",
        "config.yaml",
        f"parallel.backend={backend}",
        "run_dir=new",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    ours = re.compile(r"NFN per module type|type +NFN|\w+_proj +0|\w+_proj +\d|NFN: |Chosen: |(warning|note): |new/")
    assert not [line for line in done.stdout.splitlines() if not ours.match(line)]
    of_progress = re.compile(
        r"plop-dist|reading|loading|preparing|writing|score:|place:|export:|took|Next:|\d+ samples|baselines of|"
        r"samples scored|LoRA targets|warning:|note: export to|exported to|Transformer Engine|No Transformer Engine|"
        r"Megatron"
    )
    assert not [line for line in done.stderr.splitlines() if not of_progress.match(line)]
