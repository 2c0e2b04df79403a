"""Which network interface of this host reaches another one?"""

from __future__ import annotations

import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path

LOOPBACK = "127.0.0.1"
_DISCARD = 9  # a datagram socket that is connected sends nothing: the kernel only chooses the way
_GET_ADDRESS = 0x8915  # SIOCGIFADDR, netdevice(7), which says addresses of IPv4 alone
_IPV6 = Path("/proc/net/if_inet6")  # address, index, length of the prefix, scope, flags, name


def name_is_loopback() -> bool:
    """Tell whether this host's own name leads to itself alone: to 127.0.1.1, as Debian installs it, or nowhere."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)  # gloo takes the first
    except OSError:
        return True
    return is_loopback(str(found[0][4][0]))


def is_loopback(address: str) -> bool:
    """Tell whether an address leads nowhere else."""
    return ipaddress.ip_address(address).is_loopback


def address_towards(host: str) -> str | None:
    """Return the address of this host from which another one is reached, None where there is no way."""
    with suppress(OSError):  # a name that leads nowhere
        for family, kind, _, _, address in socket.getaddrinfo(host, _DISCARD, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    return None


def interface_with(address: str) -> str | None:
    """Return the name of the interface that has an address, None where none has."""
    import fcntl

    if ":" in address:
        packed = ipaddress.ip_address(address).packed.hex()
        lines = _IPV6.read_text().splitlines() if _IPV6.is_file() else []
        return next((line.split()[-1] for line in lines if line.startswith(packed)), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                found = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
