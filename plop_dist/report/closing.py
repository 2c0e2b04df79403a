"""How every command ends: what is outdated, the files as paths from here, the time it took, and the next command."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path

from plop_dist.report.grid import show_line
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.made_from import made_from_scores, outdated
from plop_dist.values.placement import Placement
from plop_dist.values.visible import say


def print_outdated(run_dir: RunDir) -> None:
    """Print what was made from an older placement than the one that is there, and what makes it again."""
    found = outdated(run_dir)
    if not found:
        return
    names = ", ".join(item.name for item in found)
    show_line(f"warning: made from an older placement: {names}. To make them from this one:")
    for item in found:
        if item.command is not None:
            show_line(f"  {command_text(*item.command)}", is_whole=True)


def print_older_than_scores(run_dir: RunDir) -> None:
    """Print, once other scores have been written, what was made from those before."""
    names = made_from_scores(run_dir)
    if names:
        show_line(f"warning: made from the scores that were here before: {', '.join(names)}. Place again first.")


def print_of_older_scores(placement: Placement, run_dir: RunDir) -> None:
    """Print that a placement was drawn from other scores than those that are there, where it was."""
    if placement.is_of_older_scores:
        show_line("warning: placement.json was made from older scores than those that are there. To place anew:")
        show_line(f"  {command_text('place', run_dir.path)}", is_whole=True)


def print_files(*paths: Path) -> None:
    """Print those of the files and directories that are there, each as it is reached from the current directory."""
    for path in paths:
        if path.exists():
            show_line(path_from_here(path), is_whole=True)


def print_way_on(began: float, next_command: str = "") -> None:
    """Print to stderr the time since `began` (of time.monotonic) and the command that comes next, ready to paste."""
    say(f"took {duration_text(time.monotonic() - began)}", to_stderr=True)
    if next_command:
        say(f"Next: {next_command}", to_stderr=True)


def command_text(*arguments: object, program: str = "plop-dist") -> str:
    """Return a command line as a shell reads it.

    >>> command_text("place", Path("runs/my run"))
    "plop-dist place 'runs/my run'"
    """
    return shlex.join([program, *(str(argument) for argument in arguments)])


def path_from_here(path: Path) -> str:
    """Return a path as it is opened from the current directory: relative where that leads down, else whole."""
    whole, here = os.path.abspath(path), os.getcwd()
    return os.path.relpath(whole, here) if whole.startswith(here.rstrip("/") + "/") else whole


def duration_text(seconds: float) -> str:
    """Return a time as people read it.

    >>> duration_text(1.26), duration_text(84.2), duration_text(7384)
    ('1.3 s', '1 min 24 s', '2 h 3 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
