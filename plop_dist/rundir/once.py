"""Which of the ranks that a launcher started on a machine says what all of them have to say."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_KEPT_SECONDS = 3600  # far longer than ranks of one launch take to fail one after another


def is_first_to_say(message: str) -> bool:
    """Tell whether no other rank of this launch, on this machine, has said this message.

    The ranks leave marks in a directory of the user's own; where there is none that only the user can write, every
    rank speaks.
    """
    launch = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
    same = re.sub(r"^rank \d+( on \S+)?: ", "", message)
    key = hashlib.sha256("\0".join([*launch, str(os.getppid()), same]).encode()).hexdigest()[:32]
    directory = Path(tempfile.gettempdir(), f"plop-dist-said-{os.getuid()}")
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077 or directory.is_symlink():
            return True
        for mark in directory.iterdir():
            with suppress(FileNotFoundError):  # another rank clears away the same ones
                if mark.stat().st_mtime < time.time() - _KEPT_SECONDS:
                    mark.unlink()
        (directory / key).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
