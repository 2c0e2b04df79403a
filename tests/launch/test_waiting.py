"""A cluster without room: what is asked for, what there is and who holds it is said, and nothing waits for ever."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import yaml

from tests.launch.cluster_case import BIN, environment, run, session
from tests.launch.ray_head import Head, ray_head

HOLDS = """
import time, ray
ray.init(address={address!r}, log_to_driver=False)
@ray.remote(num_cpus=3)
class Holder:
    def ready(self): return True
holder = Holder.remote()
ray.get(holder.ready.remote())
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as running:  # of 4 CPUs
        yield running


def config(directory: Path, head: Head, **cluster: float) -> Path:
    tree = {
        "run_dir": str(directory / "run"),
        "model": {"name_or_path": "some/model"},
        "data": {"path": "builtin:arithmetic"},
        "parallel": {"dp": 2}, "cluster": {"address": head.address, **cluster},
    }  # fmt: skip
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_more_than_the_cluster_has_is_refused_at_once(tmp_path: Path, head: Head) -> None:
    done = run(BIN / "plop-dist", "score", config(tmp_path, head, cpus_per_worker=3))
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert "2 workers need 3 CPUs each (parallel.tp (1) * parallel.pp (1) * parallel.dp (2))" in said
    assert "has 4 CPUs, free 4 CPUs; lower cluster.cpus_per_worker or the parallel sizes, or add nodes" in said


@pytest.mark.slow
def test_a_busy_cluster_is_waited_for_in_the_stated_time_and_its_holder_named(tmp_path: Path, head: Head) -> None:
    command = [sys.executable, "-c", HOLDS.format(address=head.address)]
    with session(command, environment()) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        began = time.monotonic()
        done = run(BIN / "plop-dist", "score", config(tmp_path, head, start_timeout_s=8), timeout_s=90)
        assert time.monotonic() - began < 60
    assert done.returncode == 1, done.stderr
    assert re.search(r"waiting up to [1-8] s \(cluster\.start_timeout_s\)", done.stderr), done.stderr
    said = done.stderr.splitlines()[-1]
    assert "has 4 CPUs, free 1 CPU" in said
    assert re.search(rf"job \w+ \(process {holder.pid} on [\d.]+\) holds 3 CPUs", said), said
    assert "waited for cluster.start_timeout_s (8 s)" in said
    assert "Traceback" not in done.stderr


@pytest.mark.rare
@pytest.mark.timeout(400)
def test_a_head_that_dies_while_room_is_waited_for_is_named(tmp_path: Path) -> None:
    with ExitStack() as running:
        head = running.enter_context(ray_head())
        holding = [sys.executable, "-c", HOLDS.format(address=head.address)]
        holder = running.enter_context(session(holding, environment()))
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        command = [str(BIN / "plop-dist"), "score", str(config(tmp_path, head))]
        process = running.enter_context(session(command, environment()))
        path = tmp_path / "run" / "events.jsonl"
        until = time.monotonic() + 120
        while not (path.is_file() and "waiting up to" in path.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)
        for gcs in psutil.process_iter(["name"]):
            if gcs.info["name"] == "gcs_server" and head.address.rpartition(":")[2] in " ".join(gcs.cmdline()):
                gcs.kill()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert re.search(r"error: the Ray head at \S+ has not answered for 30 s", err.splitlines()[-1]), err


@pytest.mark.slow
def test_what_is_no_dashboard_and_what_does_not_answer_are_one_message_each(tmp_path: Path, head: Head) -> None:
    path = config(tmp_path, head)
    for address, words in (
        (f"http://{head.address}", "is not Ray's dashboard: what listens there is no web server"),
        ("http://127.0.0.1:1", "cannot be reached"),
    ):
        done = run(BIN / "plop-dist", "submit", path, "--address", address, timeout_s=60)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_job_is_left_to_itself_stopped_and_sent_its_folder(tmp_path: Path, head: Head) -> None:
    path = config(tmp_path, head, start_timeout_s=300, gpus_per_worker=0)
    (tmp_path / "rows.jsonl").write_text('{"text": "a b"}\n')
    given = ["--address", head.dashboard, "--working-dir", tmp_path, "data.path=rows.jsonl", "data.text_field=text"]
    refused = run(BIN / "plop-dist", "submit", path, *given, "run_dir=here")
    assert refused.returncode == 2
    assert "run_dir 'here' is relative" in refused.stderr
    taken = run(BIN / "plop-dist", "submit", path, *given, "--no-wait")
    assert taken.returncode == 0, taken.stderr
    _stop(taken.stdout.split()[1], head, taken.stdout)


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_and_says_so(tmp_path: Path, head: Head) -> None:
    path = config(tmp_path, head, start_timeout_s=300)
    command = [str(BIN / "plop-dist"), "submit", str(path), "--address", head.dashboard]
    holding = [sys.executable, "-c", HOLDS.format(address=head.address)]
    # The job waits for what another one holds: it cannot end by itself before it is left.
    with session(holding, environment()) as holder, session(command, environment()) as process:
        assert holder.stdout is not None
        assert process.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert process.stdout.readline(), "the job's log did not begin"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT, err
    said = re.search(r"error: no longer followed: job (\w+) goes on on the cluster\.", err)
    assert said, err
    assert "Traceback" not in err
    _stop(said[1], head, err)


def _stop(job: str, head: Head, said: str) -> None:
    """Stop a job by the command that was said."""
    assert f"stop it: plop-dist submit --stop {job} --address {head.dashboard}" in said
    stopped = run(BIN / "plop-dist", "submit", "--stop", job, "--address", head.dashboard)
    assert (stopped.returncode == 0 and f"job {job} is being stopped" in stopped.stdout) or (
        stopped.returncode == 2 and f"--stop {job}: it has ended already" in stopped.stderr
    ), stopped.stderr
