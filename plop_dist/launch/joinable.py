"""Does a Ray answer at an address, and take this user's token? Ray 2.60 itself asks for ten minutes, in silence."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from ray._private import services  # where Ray finds the address auto: nothing public says it
from ray._private.grpc_utils import init_grpc_channel  # with Ray's own token and certificates

HEAD_WAIT_S = 10.0
_DIRECT = (("grpc.enable_http_proxy", 0),)  # as Ray's own connections


def check_joinable(address: str) -> None:
    """Raise ValueError for what is no address, PermissionError for a wrong token, and OSError where no Ray answers."""
    import grpc
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    url = urlsplit(address if "://" in address else f"//{address}")
    # A Ray client, ray://, does not see what single nodes have free.
    if address != "auto" and (url.scheme or not url.hostname or not url.port):
        raise ValueError("it is not host:port or auto")
    found = str(services.canonicalize_bootstrap_address(address))
    channel: Any = init_grpc_channel(found, options=_DIRECT)
    with channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=HEAD_WAIT_S)
        except grpc.RpcError as error:
            refused = error.code() is grpc.StatusCode.UNAUTHENTICATED
            raise (PermissionError if refused else ConnectionError)(f"{found}: {error.details()}") from error
