"""What is no Ray where a job is to be taken is told at once, with the address to give instead."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from plop_dist.errors import ConfigError
from plop_dist.launch.jobs import _client
from tests.launch.cluster_case import free_ports


@pytest.fixture(scope="module")
def web_server() -> Iterator[str]:
    """Something else that speaks HTTP: host:port."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://{web}", "what answers there is another web server, without /api/version"),
        ("{web}", "a web server listens there; write http://127"),
        ("https://{web}", "does it want http:// instead"),
        ("{free}", "cannot be reached: .*refused"),
        ("ray://{free}", "cannot be reached: .*refused"),
        ("http://{free}", "cannot be reached: .*refused"),
        ("head", "it is not http://HOST:PORT"),
        ("127.0.0.1:many", "it is not http://HOST:PORT"),
    ],
)
def test_what_is_no_ray_is_told_at_once(web_server: str, address: str, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=words):
        _client(address.format(web=web_server, free=f"127.0.0.1:{free_ports(1)[0]}"))
    assert time.monotonic() - began < 10
