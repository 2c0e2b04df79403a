"""Names that somebody else's scores.json may hold, and a shell in which printed flags are tried with them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

MARK = "ran"  # the file that a command hidden in a name would leave
_END = "-- end of the arguments --"

# Each is one component of a module's path, so none holds a dot.
NAMES = (
    f"$(touch {MARK})", f"`touch {MARK}`", f"a;touch {MARK}", f"a&touch {MARK}&", f"a|touch {MARK}", f"a\ntouch {MARK}",
    f"x'$(touch {MARK})'", f'x"$(touch {MARK})"', f"x'; touch {MARK}; '", f'x"; touch {MARK}; "', f"(touch {MARK})",
    f">{MARK}", f"\x1b`touch {MARK}`", f"\u2028$(touch {MARK})", "it's", 'say "x"', "a b", "*", "a*b", "?", "~", "#x",
    "!x", "%s", "\\", "a\\", "\\'", '\\"', "a\\\\", "${HOME}", "\\${HOME}", "a${b", "{a: b}", "[x]", "a: b", "&x",
    "null", "1e3", "yes", "é", "=", "a=b", "@x", "\x1b]0;x\x07", "\t", " a ", "a,b", "-x", "--flag",
)  # fmt: skip


def arguments(commands: Iterable[Iterable[str]], directory: Path) -> list[list[str]]:
    """Return the arguments that a command gets when these lines are pasted behind it in a shell, for each set of lines.

    Asserts that nothing in them ran.
    """
    script = directory / "paste.sh"
    pasted = "\n".join(" \\\n    ".join(["show", *lines]) for lines in commands)
    script.write_text(f"""show() {{ printf '%s\\0' "$@" '{_END}'; }}\n{pasted}\n""", encoding="utf-8")
    done = subprocess.run(["sh", script.name], cwd=directory, capture_output=True, timeout=60, check=False)
    assert not (directory / MARK).exists(), script.read_text()
    assert (done.returncode, done.stderr) == (0, b""), script.read_text()
    found = done.stdout.decode().split(f"{_END}\0")
    return [words.split("\0")[:-1] for words in found[:-1]]


def assert_nothing_runs(lines: Iterable[str], directory: Path) -> None:
    """Assert that pasting these lines into a shell as they are, by mistake, runs none of what stands in names."""
    script = directory / "mistake.sh"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run(["sh", script.name], cwd=directory, capture_output=True, timeout=60, check=False)
    assert not (directory / MARK).exists(), script.read_text()
