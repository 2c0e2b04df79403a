"""Which network interface of this host reaches another one?"""

from __future__ import annotations

import ipaddress
import socket
import struct
from contextlib import suppress

LOOPBACK = "127.0.0.1"
_DISCARD = 9  # a datagram socket that is connected sends nothing: the kernel only chooses the way
_GET_ADDRESS = 0x8915  # SIOCGIFADDR, netdevice(7)


def name_is_loopback() -> bool:
    """Tell whether this host's own name leads to itself alone: to 127.0.1.1, as Debian installs it, or nowhere."""
    try:
        return is_loopback(socket.gethostbyname(socket.gethostname()))
    except OSError:
        return True


def is_loopback(address: str) -> bool:
    """Tell whether an address leads nowhere else."""
    return ipaddress.ip_address(address).is_loopback


def address_towards(host: str) -> str | None:
    """Return the address of this host from which another one is reached, None where there is no way."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, _DISCARD))
        return str(probe.getsockname()[0])
    return None


def interface_with(address: str) -> str | None:
    """Return the name of the interface that has an IPv4 address, None where none has."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                found = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
