"""Tokens of the environment stay there: none in run directories, logs, process arguments or submitted jobs."""

from __future__ import annotations

import http.client
import json
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import psutil
import pytest

from tests.launch.cluster_case import BIN, environment, make_case, processes_with, run, session

Answer = tuple[int, str, int, bytes]  # port, path, status, body

SECRETS = {
    "HF_TOKEN": "hf_" + "Secret" * 6,
    "WANDB_API_KEY": "0123456789secret0123456789secret01234567",
    "PLOP_DIST_TEST_SECRET": "of-the-environment-77aa",
    "RAY_AUTH_TOKEN": "feedfacecafebeef" * 4,
}


def found_in(content: bytes) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret.encode() in content]


class Dashboard(BaseHTTPRequestHandler):
    """Stands where Ray's dashboard does: keeps what it is sent, and takes no job."""

    received: list[bytes]

    def do_GET(self) -> None:
        if self.path.startswith("/api/version"):
            self._answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "0", "session_name": "s"})
        else:
            self._answer(404, {})

    def do_PUT(self) -> None:
        self._keep()
        self._answer(200, {})

    def do_POST(self) -> None:
        self._keep()
        self._answer(500, {})

    def _keep(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, status: int, tree: dict[str, str]) -> None:
        content = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[tuple[str, list[bytes]]]:
    received: list[bytes] = []
    handler = type("Kept", (Dashboard,), {"received": received})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


@pytest.mark.slow
def test_a_submitted_job_holds_references_and_no_secret(tmp_path: Path, dashboard: tuple[str, list[bytes]]) -> None:
    url, received = dashboard
    config = tmp_path / "config.yaml"
    data = "{path: builtin:arithmetic, split: '${oc.env:PLOP_DIST_TEST_SECRET}'}"
    config.write_text(f"model: {{name_or_path: some/model}}\ndata: {data}\n")
    done = run(BIN / "plop-dist", "submit", config, "--address", url, **SECRETS)
    assert done.returncode == 2, done.stderr
    assert "does not take this job" in done.stderr
    package, job = received
    assert json.loads(job)["entrypoint"] == "sh plop-dist-start.sh plop-dist-config.yaml"
    with zipfile.ZipFile(BytesIO(package)) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert b"some/model" in contents["plop-dist-config.yaml"]
    for content in (job, done.stdout.encode(), done.stderr.encode(), *contents.values()):
        assert found_in(content) == []


@pytest.mark.rare
def test_two_ranks_show_no_token_and_their_daemons_answer_nobody(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    train = {"method": "sft", "max_steps": 4, "micro_batch_size": 2, "max_length": 48, "eval_samples": 8}
    config = case.write("run", train={**train, "prompt_template": "{question} "})
    mark = f"PLOP_DIST_TEST_{uuid.uuid4().hex}"
    seen: set[bytes] = set()
    asking: dict[int, Future[list[Answer]]] = {}
    before = set(Path("/tmp/ray").glob("session_2*"))
    with (
        ThreadPoolExecutor(max_workers=32) as pool,  # what does not speak HTTP makes one wait
        session([str(BIN / "plop-dist"), "run", str(config)], environment(**SECRETS, **{mark: "1"})) as process,
    ):
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            for pid in processes_with(mark):
                try:
                    seen.add(Path(f"/proc/{pid}/cmdline").read_bytes())
                    ports = {at.laddr.port for at in psutil.Process(pid).net_connections() if at.status == "LISTEN"}
                except (OSError, psutil.Error):
                    continue  # it has ended meanwhile
                for port in ports - asking.keys():
                    asking[port] = pool.submit(asked, port)
            time.sleep(0.3)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert any(b"ray" in line for line in seen), "no process of Ray's was seen"
    for line in seen:
        assert found_in(line) == [], line
    assert found_in((out + err).encode()) == []
    logs = [path for path in Path("/tmp/ray").glob("session_2*") if path not in before]
    assert logs
    for folder in (tmp_path / "run", *logs):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert found_in(path.read_bytes()) == [], path
    answers = [answer for future in asking.values() for answer in future.result()]
    assert 401 in {status for _, _, status, _ in answers}, f"none of {sorted(asking)} asked for a token"
    for port, path, status, body in answers:
        # Ray's exporters of metrics answer whatever they are asked with their numbers.
        assert status in (0, 401) or body.startswith(b"# HELP "), (port, path, body[:300])
        assert found_in(body) == []


def asked(port: int) -> list[Answer]:
    """Return what a port answers who has no token; status 0 where that is no HTTP."""
    return [(port, path, *answer_of(port, path)) for path in ("/api/jobs/", "/nodes?view=summary", "/metrics", "/")]


def answer_of(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
