"""A lock that a killed build has left is named instead of waited for; a build that goes on is waited for."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from plop_dist.errors import WorkerError
from plop_dist.launch.builds import bounded_builds


def locked(tmp_path: Path, age_s: float) -> FileBaton:
    """Return torch's baton for a build in whose folder nothing has changed for so long."""
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    (folder / "lock").touch()
    then = time.time() - age_s
    for path in (folder / "lock", folder):
        os.utime(path, (then, then))
    return FileBaton(str(folder / "lock"))


def test_a_stale_lock_is_named_at_once(tmp_path: Path) -> None:
    baton, began = locked(tmp_path, age_s=1000), time.monotonic()
    stale = rf"^{tmp_path}/cpu_adam/lock says .*for 1000 s .*delete that file and run"
    with pytest.raises(WorkerError, match=stale), bounded_builds(600):
        baton.wait()
    assert time.monotonic() - began < 5
    with bounded_builds(600):
        assert FileBaton(str(tmp_path / "free")).try_acquire(), "who finds no lock builds"


@pytest.mark.slow
def test_a_build_that_goes_on_is_waited_for_and_one_that_stops_is_not(tmp_path: Path) -> None:
    baton = locked(tmp_path, age_s=0)

    def build() -> None:
        for number in range(10):
            time.sleep(0.2)
            (tmp_path / "cpu_adam" / f"{number}.o").touch()
        baton.release()

    thread = threading.Thread(target=build)
    thread.start()
    with bounded_builds(1.5):
        baton.wait()
    assert (tmp_path / "cpu_adam" / "9.o").exists(), "it was not waited for"
    thread.join()

    (tmp_path / "cpu_adam" / "lock").touch()
    with pytest.raises(WorkerError, match="nothing has changed"), bounded_builds(0.5):
        baton.wait()
