"""Ranks that cannot find each other say so in one message."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.cases import write_case
from tests.models import save_tiny


@pytest.mark.slow
def test_a_port_in_use_under_a_launcher_is_one_message(tmp_path: Path) -> None:
    config = write_case(tmp_path, save_tiny("llama", tmp_path / "model"), parallel={"dp": 2})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        launched["MASTER_PORT"] = str(port)
        done = subprocess.run(
            [sys.executable, "-m", "plop_dist.cli", "score", config], env={**os.environ, **launched},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"MASTER_PORT: rank 0 on {socket.gethostname()} cannot listen on 127.0.0.1:{port}" in done.stderr
    assert done.stderr.count("error:") == 1
