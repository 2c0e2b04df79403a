"""`make audit` tells apart: nothing known against the pins, a finding, a finding that is decided, and nobody to ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
ADVISORY: dict[str, Any] = {
    "id": "CVE-2026-0000",
    "aliases": ["MADE-2026-1"],
    "affected": [
        {
            "package": {"name": "leaky", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}],
        }
    ],
}

pytestmark = pytest.mark.skipif(
    not (CHECKOUT / ".cache" / "audit" / "bin" / "pip-audit").exists(), reason="pip-audit is not there: make audit"
)


class Service(BaseHTTPRequestHandler):
    """Answers as an advisory service does: something against `leaky` 1.5, nothing against the others."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_found = (asked["package"]["name"], asked["version"]) == ("leaky", "1.5")
        content = json.dumps({"vulns": [ADVISORY]} if is_found else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/query"
        server.shutdown()


def audit(tmp_path: Path, pins: str, url: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "pins.txt").write_text(pins)
    command = [sys.executable, CHECKOUT / ".ci" / "audit.py", tmp_path / "pins.txt"]
    options = ["--", "--vulnerability-service=osv", f"--osv-url={url}", f"--cache-dir={tmp_path}"]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.slow
def test_a_finding_is_named_and_fails_and_none_passes(tmp_path: Path, service: str) -> None:
    found = audit(tmp_path, "leaky==1.5  # a comment\nfine==1.0\n", service)
    assert found.returncode == 1, found.stderr
    finding, count = found.stdout.splitlines()
    assert finding.startswith("audit: leaky 1.5: CVE-2026-0000 (MADE-2026-1), mended in 2.0: not decided")
    assert count == "audit: 2 of 2 pinned releases asked about, 1 advisories"
    mended = audit(tmp_path, "leaky==2.0\nfine==1.0\n", service)
    assert (mended.returncode, mended.stdout) == (0, "audit: 2 of 2 pinned releases asked about, 0 advisories\n")


@pytest.mark.slow
def test_a_service_that_cannot_be_asked_is_said_and_fails_nothing(tmp_path: Path) -> None:
    done = audit(tmp_path, "fine==1.0\n", "http://127.0.0.1:9/query")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("audit: NOT DONE: the advisory service cannot be asked: ")
