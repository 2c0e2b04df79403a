"""Of ranks that fail with the same message, one says it, also while all of them clear away what earlier ones left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RANK = """
import sys
from plop_dist.rundir.once import is_first_to_say
print("ready", flush=True)
sys.stdin.readline()
print(is_first_to_say(f"rank {sys.argv[1]}: no such file"), is_first_to_say("another"))
"""


def test_several_ranks_say_it_once_while_old_marks_are_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / f"plop-dist-said-{os.getuid()}"
    folder.mkdir(mode=0o700)
    for number in range(3000):
        (folder / f"old{number}").touch()
        os.utime(folder / f"old{number}", (0, 0))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank)],
            env={**os.environ, "TMPDIR": str(tmp_path)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(4)
    ]  # fmt: skip
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("go\n")
        rank.stdin.flush()
    said = [rank.communicate(timeout=60)[0].split() for rank in ranks]
    assert [sum(one[place] == "True" for one in said) for place in (0, 1)] == [1, 1]
    assert not list(folder.glob("old*"))
