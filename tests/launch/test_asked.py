"""What is asked of a Ray is waited for as long as its head answers: in a cluster's own words, or in a job's log."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from plop_dist.config.loading import parse_config
from plop_dist.errors import WorkerError
from plop_dist.launch import asked, jobs
from tests.launch.cluster_case import free_ports


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make the waits short; what is given is set at the end, so that no thread stays."""
    monkeypatch.setattr(asked, "HEAD_WAIT_S", 0.2)
    monkeypatch.setattr(asked, "_LOOK_S", 0.05)
    return threading.Event()


def test_what_was_asked_for_is_returned_or_raised() -> None:
    assert asked.Asked(lambda: 3).outcome("") == 3
    with pytest.raises(KeyError, match="absent"):
        asked.Asked(lambda: {}["absent"]).outcome("")


def test_a_head_that_is_gone_is_named(waiting: threading.Event) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    question = asked.Asked(waiting.wait)
    with pytest.raises(WorkerError, match=rf"the Ray head at {address} has not answered for 0\.2 s.*Run again"):
        question.outcome(address)
    waiting.set()
    assert question.has_ended.wait(10)


class Client:
    """Stands for Ray's client of jobs: `follow` is what happens to who follows the log."""

    def __init__(self, address: str, follow: Callable[[], object]) -> None:
        self.address, self.follow, self.stopped = address, follow, threading.Event()

    def get_address(self) -> str:
        return self.address

    def submit_job(self, **_: Any) -> str:
        return "raysubmit_1"

    def stop_job(self, job: str) -> None:
        assert job == "raysubmit_1"
        self.stopped.set()

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.follow()
        yield ""


def test_a_job_whose_dashboard_is_gone_is_left_with_the_way_to_follow_it(
    waiting: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed() -> None:
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    for follow, why in ((closed, "closed unexpectedly"), (waiting.wait, "has not answered")):
        with pytest.raises(WorkerError, match=rf"{why}[^|]*raysubmit_1 may go on\.\nfollow it: .*{address}"):
            jobs._follow_job(Client(address, follow), "raysubmit_1", address)
    waiting.set()


def test_the_job_of_a_run_that_is_interrupted_ends_with_it(
    waiting: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    client = Client("http://127.0.0.1:1", waiting.wait)
    monkeypatch.setattr(jobs, "connected", lambda *_, **__: nullcontext())
    monkeypatch.setattr(jobs, "JobSubmissionClient", lambda _: client)
    monkeypatch.setattr(jobs, "_is_web_server", interrupt)
    tree = {"model": {"name_or_path": "m"}, "data": {"path": "d"}, "cluster": {"address": "127.0.0.1:1"}}
    with pytest.raises(KeyboardInterrupt):
        jobs.run_script(parse_config(tree), tmp_path / "launch.sh", tmp_path)
    assert client.stopped.is_set(), "it goes on, and the next run starts another beside it"
    waiting.set()
