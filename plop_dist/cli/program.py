"""How a command is registered, and what all of them share: how much they say, and how they end."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import typer

from plop_dist.config import arguments as given
from plop_dist.config.command_help import COMMANDS, PROGRAM
from plop_dist.rundir import talk
from plop_dist.values.visible import say

_Command = TypeVar("_Command", bound=Callable[..., None])

_TAKE_TIME = {"check", "score", "place", "export", "report", "run", "compare", "submit", "diff", "bench", "doctor"}
_began = time.monotonic()

_commands: list[tuple[str, Callable[..., None]]] = []


def command(group: str) -> Callable[[_Command], _Command]:
    """Return a decorator for a command, whose help begins with the function's docstring."""

    def note(function: _Command) -> _Command:
        _commands.append((group, function))
        return function

    return note


def assembled(*modules: ModuleType) -> typer.Typer:
    """Return the program with the commands of these modules, in the order in which help lists them."""
    app = typer.Typer(rich_markup_mode="markdown", no_args_is_help=True, pretty_exceptions_enable=False, help=PROGRAM)
    app.callback(invoke_without_command=True)(_program)
    for module in modules:
        for group, function in _commands:
            if function.__module__ == module.__name__:
                name = function.__name__
                kind = given.ListsTargets if name == "export" else None
                text = f"{function.__doc__}\n\n{COMMANDS[name]}"
                app.command(name, cls=kind, help=text, rich_help_panel=group)(_with_talk(function))
    return app


def _program(version: given.Version = False) -> None:
    """Print the version, where only that is asked for; every command comes after."""
    if version:
        from plop_dist import __version__

        say(f"plop-dist {__version__}")
        raise typer.Exit


def _with_talk(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command that also takes -q, -v and --log-file, and says at once what it is about to do."""

    @functools.wraps(function)
    def spoken(*, quiet: bool, verbose: bool, log_file: Path | None, **arguments: Any) -> None:
        talk.options.is_quiet, talk.options.is_verbose, talk.options.log_file = quiet, verbose, log_file
        logging.getLogger("plop_dist").setLevel(logging.DEBUG if verbose else logging.INFO)
        if not quiet and speaks() and function.__name__ in _TAKE_TIME:
            say(f"plop-dist {function.__name__}: starting", to_stderr=True)
        try:
            function(**arguments)
        except Exception as error:
            interrupt = _interrupt_behind(error)
            if interrupt is not None:
                raise interrupt from None
            raise

    own = inspect.signature(function, eval_str=True)
    vars(spoken)["__signature__"] = own.replace(parameters=[*own.parameters.values(), *given.TALK.values()])
    spoken.__annotations__ = {**function.__annotations__, **{name: it.annotation for name, it in given.TALK.items()}}
    return spoken


def _interrupt_behind(error: BaseException) -> BaseException | None:
    """Return the SIGINT or SIGTERM that was being answered when this went wrong (a pipe to processes that ended too).

    It is what has happened; of a broken pipe alone click would make status 1 without a word.
    """
    while (context := error.__context__) is not None:
        if isinstance(context, KeyboardInterrupt) or (isinstance(context, SystemExit) and context.code in (130, 143)):
            return context
        error = context
    return None


def checked_config(path: Path, overrides: list[str] | None) -> Any:
    """Return the configuration of a file with overrides laid over it. Raises ConfigError."""
    from plop_dist.config.loading import load_config

    return load_config(path, overrides or [])


def way_on(*next_command: object, program: str = "plop-dist") -> None:
    """Print the time it took and the next command to paste, unless -q."""
    from plop_dist.report.closing import command_text, print_way_on

    if not talk.options.is_quiet:
        print_way_on(_began, command_text(*next_command, program=program) if next_command else "")


def speaks() -> bool:
    """Tell whether this process prints results: under a launcher only rank 0 does."""
    return int(os.environ.get("RANK", 0)) == 0
