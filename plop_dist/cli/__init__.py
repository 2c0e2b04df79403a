"""The command line: what begins and ends every command. The commands are the functions of the modules beside this."""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
import threading
import time
from contextlib import suppress

from plop_dist.cli import look_up, prepare, steps, whole
from plop_dist.cli.program import assembled
from plop_dist.errors import ConfigError, PlopError
from plop_dist.launch import inside_ray
from plop_dist.launch.launcher import adopt_launcher
from plop_dist.rundir import talk
from plop_dist.values.secret_texts import secret_part, without_secrets
from plop_dist.values.visible import make_messages_visible, say, visible

_THREADS_WAIT_S = 5.0

app = assembled(prepare, steps, whole, look_up)


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 2, never a traceback."""
    if logging.lastResort is not None:  # what is logged outside of a run, where no other handler takes it
        logging.lastResort.setFormatter(logging.Formatter("warning: %(message)s"))
    make_messages_visible()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names from files are shown whatever the terminal can write
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        adopt_launcher()
        _check_arguments()
        app(
            prog_name="plop-dist"
        )  # ends in SystemExit: 0, typer's own 2 for wrong usage, 130 and 143 after SIGINT and SIGTERM
    except PlopError as error:
        if _says_errors(str(error)):
            if "--json" in sys.argv[1:]:
                from plop_dist.report import machine

                machine.tell("error", **machine.failed(error, error.exit_status))
            say(f"error: {error}", to_stderr=True)
        _leave(error.exit_status)
    except SystemExit as stop:
        if stop.code in (130, 143):
            say("interrupted; the same command goes on from what is on disk", to_stderr=True)
        _leave(int(stop.code or 0))
    except OSError as error:  # standard output is on a full disk
        say(f"error: {error}", to_stderr=True)
        _leave(1)


def _check_arguments() -> None:
    """Raise ConfigError for an argument that holds a secret, or hides something: it could not be shown as it is."""
    for argument in sys.argv[1:]:
        whole = argument.encode(errors="ignore").decode()  # other messages tell of what is no UTF-8
        if visible(whole) != whole:
            raise ConfigError(
                f"the argument '{visible(argument)}' holds a control character or one that is not seen; leave it out, "
                "and rename a folder or file that has it in its name."
            )
        part = secret_part(argument, is_prose="=" in argument)
        if part is not None:
            raise ConfigError(
                f"the argument '{without_secrets(argument)}' holds {part}, which everyone on this machine can read; "
                "give it through the environment (HF_TOKEN, RAY_AUTH_TOKEN, ~/.netrc) and leave it out."
            )


def _says_errors(message: str) -> bool:
    """Tell whether this process prints an error: of launched ranks that all raise it, the first."""
    if "RANK" not in os.environ:
        return True
    from plop_dist.rundir.once import is_first_to_say

    return is_first_to_say(message)


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            if stream is not None:  # it is None where the caller has closed it
                stream.flush()
    atexit.register(talk.silence_the_end)  # registered last, it comes first
    if inside_ray.is_inside():
        os._exit(status)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # After a failure peers may still wait in a collective with this rank; the launcher ends them once it sees this
        # exit. After success gloo's threads, which outlive its groups, may abort the interpreter's own end.
        if not status:
            atexit._run_exitfuncs()
        os._exit(status)
    left = [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    if left:
        threading.Thread(target=_end_without, args=(left, status), daemon=True).start()
    sys.exit(status)


def _end_without(left: list[threading.Thread], status: int) -> None:
    """End the process some seconds after its main thread, whatever a user's code left in others: a stuck reward."""
    threading.main_thread().join()
    until = time.monotonic() + _THREADS_WAIT_S
    for one in left:
        one.join(max(0.0, until - time.monotonic()))
    if any(one.is_alive() for one in left):
        atexit._run_exitfuncs()
        os._exit(status)
