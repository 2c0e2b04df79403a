"""The interface that reaches another host is found by its address, of IPv4 and of IPv6."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from plop_dist.values import interface

NAMES = {name for _, name in socket.if_nameindex()}


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_this_host_itself_is_reached_through_the_loopback(address: str) -> None:
    if ":" in address and not Path("/proc/net/if_inet6").is_file():
        pytest.skip("this kernel has no IPv6")
    assert interface.address_towards(address) == address
    name = interface.interface_with(address)
    assert name in NAMES
    assert name is not None
    assert name.startswith("lo")


def test_addresses_of_others_have_no_interface() -> None:
    assert interface.interface_with("192.0.2.77") is None
    assert interface.interface_with("2001:db8::77") is None
    assert interface.address_towards("no-such-host.invalid") is None


@pytest.mark.parametrize(
    ("address", "is_loopback"), [("127.0.1.1", True), ("::1", True), ("192.0.2.77", False), ("2001:db8::77", False)]
)
def test_a_name_is_judged_by_where_it_leads_first(
    monkeypatch: pytest.MonkeyPatch, address: str, is_loopback: bool
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: address)
    assert interface.name_is_loopback() == is_loopback
