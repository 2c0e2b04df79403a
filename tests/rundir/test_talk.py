"""What libraries say goes to the log, and no secret stays there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys
from pathlib import Path
from plop_dist.rundir.talk import kept_apart

with kept_apart(Path(sys.argv[1])):
    print("Authorization: Bearer abcdefghijklmnop1234567890")
    os.write(2, b"token hf_abcdefghijklmnopqrstuvwxyz0123456789 of a library\\n")
print("ours")
"""


def test_a_secret_that_a_library_prints_does_not_stay_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("what was there before\n")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(log)], capture_output=True, text=True, check=True)
    assert done.stdout == "ours\n"
    assert done.stderr == ""
    said = log.read_text()
    assert said.startswith("what was there before\n")
    assert "of a library" in said
    assert said.count("[redacted]") == 2
    assert "abcdefghijklmnop" not in said
