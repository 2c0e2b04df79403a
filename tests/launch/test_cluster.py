"""Ray: workers that are killed come back, bad input is one message, and jobs run on a cluster started by hand."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from plop_dist.config.loading import parse_config
from plop_dist.errors import ConfigError, DataError, LayoutError, RunDirError, WorkerError
from plop_dist.launch import cluster, joinable, workers
from plop_dist.launch import environment as environment_of
from plop_dist.launch.causes import cause
from plop_dist.rundir.attempts import begin_attempt
from plop_dist.rundir.stages import Stages
from tests.launch.cluster_case import BIN, ROOT, Case, environment, events, make_case, processes_with, run, session
from tests.launch.ray_head import Head, kill_rank_1_in_the_middle, ray_head, wait_for

TRAINING = {"method": "sft", "max_steps": 12, "learning_rate": 1e-2, "micro_batch_size": 2, "max_length": 48,
            "eval_samples": 8, "prompt_template": "{question} ", "save_steps": 3}  # fmt: skip


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as running:
        yield running


@pytest.fixture(scope="module")
def submitted(case: Case, head: Head) -> Any:
    """The uninterrupted run: scoring and training on two ranks, through `plop-dist submit`."""
    config = case.write("submitted", train=TRAINING)
    return run(BIN / "plop-dist", "submit", config, "--address", head.dashboard)


@pytest.mark.slow
def test_submitted_job_on_two_zero3_ranks_scores_like_one_process_and_trains(case: Case, submitted: Any) -> None:
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    case.assert_same_scores("submitted")
    assert (case.directory / "submitted" / "train" / "adapter" / "adapter_model.safetensors").is_file()
    assert "samples scored: 96/96" in submitted.stdout
    assert "NFN per module type" in submitted.stdout


@pytest.mark.slow
def test_workers_killed_in_scoring_and_in_training_change_nothing(case: Case, head: Head, submitted: Any) -> None:
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    whole = {"address": head.address, "max_failures": 2, "cpus_per_worker": 2}  # all of its 4 CPUs, at each start
    config = case.write("killed", train=TRAINING, cluster=whole)
    run_dir = case.directory / "killed"
    with session([str(BIN / "plop-dist"), "run", str(config)], environment()) as process:
        for kind, least in (("scoring", 24), ("training", 4)):
            kill_rank_1_in_the_middle(run_dir, kind, least, process)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err

    case.assert_same_scores("killed")
    seen = events(run_dir)
    assert [event["attempt"] for event in seen if event["event"] == "worker" and event["rank"] == 1] == [1, 2, 3]
    resumed = next(event for event in seen if event["event"] == "resumed")
    assert 0 < resumed["done"] < resumed["total"]
    steps = [event["done"] for event in seen if event["event"] == "training"]
    assert steps[-1] == 12
    assert steps.count(1) == 1, f"training began again from the first step: {steps}"
    expected, got = (
        json.loads((case.directory / name / "train" / "summary.json").read_text()) for name in ("submitted", "killed")
    )
    assert got["held_out_after"] == pytest.approx(expected["held_out_after"], abs=1e-4)
    assert got["held_out_before"] == pytest.approx(expected["held_out_before"], abs=1e-4)
    assert (run_dir / "train" / "adapter" / "adapter_model.safetensors").is_file()
    for count in (1, 2):
        assert re.search(rf"rank 1 on .*: its process died .*; the workers are restarted, {count} of 2 times", err)
    assert f"resumed: {resumed['done']} of 96 samples" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ray_job_submit_script(case: Case, head: Head) -> None:
    config = case.write("script", parallel={"backend": "transformers", "dp": 1, "zero_stage": 0})
    script = ROOT / "launchers" / "ray_job_submit.sh"
    done = run(script, config, "data.batch_size=16", RAY_API_SERVER_ADDRESS=head.dashboard)
    assert done.returncode == 0, done.stdout + done.stderr
    case.assert_same_scores("script")


@pytest.mark.slow
def test_bad_input_found_by_workers_is_one_message_without_a_retry_and_leaves_no_process(case: Case) -> None:
    config = case.write("bad", data={"template": None, "text_field": "nothing"})
    mark = f"PLOP_DIST_TEST_{uuid.uuid4().hex}"
    done = run(BIN / "plop-dist", "run", config, **{mark: "1"})
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "nothing" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    attempts = [event["attempt"] for event in events(case.directory / "bad") if event["event"] == "worker"]
    assert attempts == [1, 1], "bad input was tried again"
    assert_nothing_left(mark)


@pytest.mark.slow
def test_an_interrupted_run_says_so_leaves_no_process_and_goes_on(case: Case) -> None:
    config = case.write("interrupted")
    run_dir, mark = case.directory / "interrupted", f"PLOP_DIST_TEST_{uuid.uuid4().hex}"
    with session([str(BIN / "plop-dist"), "score", str(config)], environment(**{mark: "1"})) as process:
        wait_for(run_dir, "scoring", 8, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert "interrupted; the same command goes on" in err
    assert "Traceback" not in err
    assert not (run_dir / "scores.json").exists()
    assert_nothing_left(mark)
    done = run(BIN / "plop-dist", "score", config)
    assert done.returncode == 0, done.stderr
    assert "resumed: " in done.stderr
    case.assert_same_scores("interrupted")


def test_more_ranks_than_this_machine_takes_are_refused_before_ray_starts(case: Case) -> None:
    config = parse_config(case.tree("many", parallel={"dp": 10**6}))
    with pytest.raises(LayoutError, match=r"make 1000000 ranks, but without cluster\.address .* lower them"):
        workers.run_workers(Stages(config), ["score"])


def assert_nothing_left(mark: str) -> None:
    deadline = time.monotonic() + 20  # Ray's processes end a moment after their driver
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def test_the_oldest_record_of_the_last_attempt_is_the_cause(tmp_path: Path) -> None:
    assert begin_attempt(tmp_path) == 1
    assert cause(tmp_path, {}) is None
    _record(tmp_path, 0, "RuntimeError", "Connection closed by peer", age_s=1)
    _record(tmp_path, 1, "WorkerError", "rank 1: scoring step 3 failed", age_s=2)
    found = cause(tmp_path, {})
    assert type(found) is WorkerError
    assert str(found) == "rank 1: scoring step 3 failed"

    assert begin_attempt(tmp_path) == 2, "an error that is not the user's is worth another attempt"
    assert cause(tmp_path, {}) is None, "records of the first attempt were kept"
    _record(tmp_path, 0, "RuntimeError", "Connection closed by peer", age_s=1)
    assert str(cause(tmp_path, {})) == "rank 0: Connection closed by peer"


def test_bad_input_is_raised_as_its_own_class(tmp_path: Path) -> None:
    _record(tmp_path, 0, "RuntimeError", "Connection closed by peer", age_s=1)
    _record(tmp_path, 1, "DataError", "row 3 has no field 'text'", user=True, age_s=2)
    assert type(cause(tmp_path, {0: RuntimeError("collateral")})) is DataError
    found = cause(tmp_path / "elsewhere", {0: RuntimeError("collateral"), 1: RunDirError("another folder")})
    assert type(found) is RunDirError


def test_a_dead_process_is_named_before_what_its_peers_saw(tmp_path: Path) -> None:
    from ray.exceptions import RayActorError

    _record(tmp_path, 0, "RuntimeError", "Connection closed by peer", age_s=1)
    raised = {0: RuntimeError("Connection closed by peer"), 1: RayActorError()}
    found = cause(tmp_path, raised, ["node1", "node2 (10.77.0.2)"])
    assert type(found) is WorkerError
    assert str(found).startswith("rank 1 on node2 (10.77.0.2): its process died")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:8265", "not host:port"),
        ("ray://127.0.0.1:10001", "not host:port"),
        ("nonsense", "not host:port"),
        ("127.0.0.1:1", "refused"),
    ],
)
def test_an_address_where_no_ray_listens_fails_at_once(address: str, reason: str) -> None:
    tree = {"model": {"name_or_path": "m"}, "data": {"path": "d"}, "cluster": {"address": address}}
    started = time.monotonic()
    with (
        pytest.raises(ConfigError, match=f"cluster.address '{address}' cannot be joined: .*{reason}"),
        cluster.connected(parse_config(tree)),
    ):
        pass
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("given", "variable"), [("auto", "127.0.0.1:1"), (None, "127.0.0.1:1"), (None, "http://h:1")])
def test_an_address_of_the_environment_is_named_as_such(
    monkeypatch: pytest.MonkeyPatch, given: str | None, variable: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    config = parse_config({"model": {"name_or_path": "m"}, "data": {"path": "d"}, "cluster": {"address": given}})
    started = time.monotonic()
    with (
        pytest.raises(ConfigError, match=f"^the environment variable RAY_ADDRESS '{variable}' cannot be joined"),
        cluster.connected(config),
    ):
        pass
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [(None, "", None), (None, "local", None), ("local", "h:1", None), ("g:1", "h:1", "g:1"), ("auto", "", "auto")],
)
def test_ray_s_own_words_for_addresses(
    monkeypatch: pytest.MonkeyPatch, given: str | None, variable: str, expected: str | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    tree = {"model": {"name_or_path": "m"}, "data": {"path": "d"}, "cluster": {"address": given}}
    assert cluster.address_of(parse_config(tree)) == expected


@pytest.mark.parametrize(("answer", "reason"), [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "connect"), (None, "Deadline")])
def test_what_listens_and_is_no_ray_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, reason: str
) -> None:
    monkeypatch.setattr(joinable, "HEAD_WAIT_S", 2)

    def serve() -> None:
        with suppress(OSError):  # it listens no more
            while True:
                connection, _ = listening.accept()
                opened.append(connection)
                if answer is not None:
                    connection.sendall(answer)

    opened: list[socket.socket] = []
    with socket.create_server(("", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(OSError, match=reason):
            joinable.check_joinable(f"127.0.0.1:{listening.getsockname()[1]}")
        assert time.monotonic() - started < 30
    for connection in opened:
        connection.close()


@pytest.mark.parametrize("is_starting", [True, False])
def test_sigterm_is_answered_with_its_status_whatever_ray_answers(
    monkeypatch: pytest.MonkeyPatch, is_starting: bool
) -> None:
    def start(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as ray.init does
        if is_starting:
            os.kill(os.getpid(), signal.SIGTERM)

    shut: list[bool] = []
    monkeypatch.setattr(cluster.ray, "init", start)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: shut.append(True))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    config = parse_config({"model": {"name_or_path": "m"}, "data": {"path": "d"}})

    def work() -> None:
        with cluster.connected(config):
            assert not is_starting
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit) as stop:
        work()
    assert stop.value.code == 128 + signal.SIGTERM
    assert shut == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_ray_that_a_thread_is_inside_of_is_ended_without_asking_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(cluster.ray, "init", lambda **_: None)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: ended.append("asked"))
    monkeypatch.setattr(cluster.inside_ray, "end_local", lambda: ended.append("killed"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = parse_config({"model": {"name_or_path": "m"}, "data": {"path": "d"}})
    answer = threading.Event()
    has_ended = cluster.inside_ray.start(answer.wait)
    with cluster.connected(config):
        pass
    answer.set()
    assert has_ended.wait(60)
    with cluster.connected(config):
        pass
    assert ended == ["killed", "asked"]


@pytest.mark.slow
def test_a_local_ray_is_started_beside_one_that_ray_start_has_left() -> None:
    code = """
import ray
from plop_dist.config.loading import parse_config
from plop_dist.launch import cluster, doctor
with cluster.connected(parse_config({"model": {"name_or_path": "m"}, "data": {"path": "d"}})):
    print(ray.get_runtime_context().gcs_address)
print(doctor.probe("Ray", doctor._RAY, limit_s=100).status)
"""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # a socket's path has 107 characters
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:1")
        variables = {name: value for name, value in environment().items() if name != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**variables, "RAY_TMPDIR": folder}, capture_output=True, text=True,
            timeout=150, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    address, status = done.stdout.split()
    assert address != "127.0.0.1:1"
    assert status == "ok"


def test_what_a_local_ray_has_started_is_ended_to_the_last() -> None:
    code = """
import subprocess, sys, psutil
from plop_dist.launch import inside_ray

script = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print('there', flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
assert len(found := psutil.Process().children(recursive=True)) == 2
inside_ray.end_local()
assert not any(process.is_running() and process.status() != "zombie" for process in found)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.slow
def test_submit_without_the_token_is_one_message(case: Case, head: Head) -> None:
    config = case.write("unknown")
    done = run(BIN / "plop-dist", "submit", config, "--address", head.dashboard, RAY_AUTH_TOKEN="0" * 32)
    assert done.returncode == 2, done.stderr
    begun, said = done.stderr.splitlines()
    assert begun == "plop-dist submit: starting"
    assert said.startswith(f"error: --address {head.dashboard} does not take this job")


@pytest.mark.slow
def test_a_run_without_the_token_is_one_message_at_once(case: Case, head: Head) -> None:
    config = case.write("refused", cluster={"address": head.address})
    done = run(BIN / "plop-dist", "score", config, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"error: cluster.address '{head.address}' cannot be joined")
    assert "RAY_AUTH_TOKEN" in said


def test_workers_get_threads_by_cores_and_this_process_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PLOP_DIST_CACHE", "/somewhere")
    tree = {"model": {"name_or_path": "m"}, "data": {"path": "d"}, "cluster": {"cpus_per_worker": 3}}
    variables = environment_of.worker_environment(parse_config(tree))
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["TORCH_EXTENSIONS_DIR"] == "/somewhere/torch_extensions"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment_of.worker_environment(parse_config(tree))["OMP_NUM_THREADS"] == "1", (
        "the user's own choice was overruled"
    )


def _record(directory: Path, rank: int, kind: str, message: str, *, age_s: float, user: bool = False) -> None:
    path = directory / f"error-rank-{rank}.json"
    path.write_text(json.dumps({"rank": rank, "kind": kind, "message": message, "user": user}))
    then = time.time() - age_s
    os.utime(path, (then, then))
