"""Two hosts whose ranks a launcher started: what is killed, cut off, full or late is named, and goes on when it can."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.cluster_case import BIN, Case, environment, make_case
from tests.launch.hosts import Hosts, all_at_once, hosts
from tests.launch.ray_head import wait_for

pytestmark = [pytest.mark.rare, pytest.mark.timeout(600)]
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")  # Debian's libfaketime
TIMEOUT_S = 30


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(2, tmp_path_factory.mktemp("launched"), style="debian") as made:
        yield made


@pytest.fixture(scope="module")
def case(two: Hosts) -> Case:
    return make_case(two.shared)


def score(
    two: Hosts,
    case: Case,
    name: str,
    fault: Callable[[], object] | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    on_second: tuple[str, ...] = (),
) -> tuple[list[subprocess.CompletedProcess[str]], float]:
    """Score with a rank on each host, let something happen in the middle, and return both and the seconds after it."""
    plain = {"backend": "transformers", "zero_stage": 0}
    config = case.write(name, parallel=plain, cluster={"timeout_s": timeout_s})
    variables = ["WORLD_SIZE=2", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1", "MASTER_ADDR=node1", "MASTER_PORT=29412"]
    own = [["RANK=0"], ["RANK=1", *on_second]]
    commands = [["env", *more, *variables, BIN / "plop-dist", "score", config] for more in own]
    with all_at_once(two, commands, environment(**two.variables)) as processes:
        if fault is not None:
            wait_for(case.directory / name, "scoring", 8, processes[0])
            fault()
        began = time.monotonic()
        said = [process.communicate(timeout=200) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, err)
        for process, (out, err) in zip(processes, said, strict=True)
    ], time.monotonic() - began


def test_a_host_that_is_killed_is_named_and_what_was_done_is_taken_up(two: Hosts, case: Case) -> None:
    (first, _), seconds = score(two, case, "killed", lambda: two.do("kill", "2"))
    assert seconds < 60
    assert first.returncode == 1, first.stderr
    assert "No answer from: rank 1 on node2." in first.stderr.splitlines()[-1]
    two.do("start", "2")
    done, _ = score(two, case, "killed")
    assert [rank.returncode for rank in done] == [0, 0], done
    assert "resumed: " in done[0].stderr
    case.assert_same_scores("killed", rtol=1e-6)


def test_a_link_that_is_cut_for_ever_is_told_after_the_time_that_was_given(two: Hosts, case: Case) -> None:
    done, seconds = score(two, case, "cut", lambda: two.do("cut", "2"))
    two.do("mend", "2")
    assert seconds < TIMEOUT_S + 60
    assert [rank.returncode for rank in done] == [1, 1], done
    said = done[0].stderr.splitlines()[-1]
    assert said.startswith("error: rank 0 on node1: ")
    assert said.endswith("No answer from: rank 1 on node2.")
    assert done[1].stderr.splitlines()[-1].startswith("error: rank 1 on node2: ")
    assert "Traceback" not in done[0].stderr + done[1].stderr


def test_a_link_that_is_cut_for_a_minute_is_waited_for(two: Hosts, case: Case) -> None:
    def cut() -> None:
        two.do("cut", "2")
        threading.Timer(60, two.do, ("mend", "2")).start()

    done, _ = score(two, case, "minute", cut, timeout_s=240)
    assert [rank.returncode for rank in done] == [0, 0], done
    case.assert_same_scores("minute", rtol=1e-6)


def test_a_disk_that_is_full_on_one_host_is_named_on_it(two: Hosts, case: Case) -> None:
    folder = case.directory / "full" / "progress"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder]
    subprocess.run(two.command(2, *mount), env=environment(**two.variables), check=True)
    done, seconds = score(two, case, "full")
    assert seconds < 90
    assert [rank.returncode for rank in done] == [1, 2], done
    said = done[1].stderr.splitlines()[-1]
    assert said.startswith(f"error: rank 1 on node2: cannot write {folder}/")
    assert "No space left on device; make run_dir writable, free space" in said
    assert done[0].stderr.splitlines()[-1].endswith("No answer from: rank 1 on node2.")


@pytest.mark.skipif(not FAKETIME.is_file(), reason="libfaketime is not installed")
def test_a_clock_that_is_an_hour_ahead_changes_nothing(two: Hosts, case: Case) -> None:
    later = (f"LD_PRELOAD={FAKETIME}", "FAKETIME=+3600s", "FAKETIME_DONT_FAKE_MONOTONIC=1")
    done, _ = score(two, case, "later", on_second=later)
    assert [rank.returncode for rank in done] == [0, 0], done
    case.assert_same_scores("later", rtol=1e-6)
