"""Whether files belong to somebody else than the user that this process runs as."""

from __future__ import annotations

import os
import pwd
from contextlib import suppress
from pathlib import Path


def other_owner(path: Path) -> str | None:
    """Return the name of the user that a path belongs to, None where that is this process's own or unknown."""
    try:
        owner = path.stat().st_uid
    except OSError:
        return None
    if owner == os.geteuid():
        return None
    with suppress(KeyError):  # no user of this machine
        return f"'{pwd.getpwuid(owner).pw_name}'"
    return f"user {owner}"
