"""Whether files belong to somebody else than the user that this process runs as."""

from __future__ import annotations

import logging
import os
import pwd
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)


def say_owner(run_dir: Path) -> None:
    """Log whose a run directory is, where it belongs to another user."""
    owner = other_owner(run_dir)
    if owner is not None:
        logger.warning(
            "%s belongs to %s, and this process runs as another user: none of its code is run, but look at what it "
            "holds before you rely on it",
            run_dir,
            owner,
        )


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
