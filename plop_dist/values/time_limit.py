"""Whether the regular expressions of a file can be matched in time, tried in a process that can be stopped.

Python's `re` cannot be interrupted, and an expression such as `(([a-z.]+)+)+!` takes for ever on an ordinary path.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from plop_dist.errors import ConfigError

LIMIT_S = 4.0  # for all patterns of a file together

_PROGRAM = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
patterns, texts = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    match = re.compile(pattern).match
    for text in texts:
        match(text)
"""


@dataclass(frozen=True)
class Pattern:
    """A regular expression of a file: its field and text there, and the whole one that is matched from the left."""

    field: str
    text: str
    regex: str


def check_time(patterns: Sequence[Pattern], texts: Collection[str], where: str, limit_s: float = LIMIT_S) -> None:
    """Raise ConfigError naming field and text of the pattern at which the time for matching all texts runs out.

    where: the file, for the message.
    """
    if not patterns:
        return
    job = json.dumps([[pattern.regex for pattern in patterns], sorted(texts)])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM], input=job, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired as stopped:
        begun = len((stopped.stdout or b"").split())
        slow = patterns[max(begun, 1) - 1]
        raise ConfigError(
            f"{where}: {slow.field} {slow.text!r} takes more than {limit_s:g} s to match the model's {len(texts):,} "
            "names; write a simpler pattern, or a list of names."
        ) from None
    if done.returncode:
        slow = patterns[max(len(done.stdout.split()), 1) - 1]
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ConfigError(f"{where}: {slow.field} {slow.text!r} cannot be matched: {reason}.")
