"""What the node's network devices do for packets that leave through them."""

from __future__ import annotations

import array
import fcntl
import socket
import struct

# linux/sockios.h, linux/ethtool.h, linux/if.h
_SIOCGIFFLAGS, _SIOCETHTOOL = 0x8913, 0x8946
_ETHTOOL_GTXCSUM = 0x16
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8


def devices_make_checksums() -> bool:
    """Whether every device that is up puts the checksums into what it sends.

    For one that does not, the kernel does, but of a buffer of UDP segments (UDP_SEGMENT) only after nftables
    have seen it: if a rule changes the port, all its checksums are wrong.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        return all(_makes_checksums(sock, name) for _, name in socket.if_nameindex())


def _makes_checksums(sock: socket.socket, name: str) -> bool:
    request = name.encode().ljust(16, b"\0")
    value = array.array("I", [_ETHTOOL_GTXCSUM, 0])
    try:
        answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, request + bytes(24))
        (flags,) = struct.unpack_from("=H", answer, 16)
        if not flags & _IFF_UP or flags & _IFF_LOOPBACK:
            return True
        fcntl.ioctl(sock, _SIOCETHTOOL, request + struct.pack("@P", value.buffer_info()[0]) + bytes(16))
    except OSError:
        return False  # it has gone, or it does not say
    return bool(value[1])
