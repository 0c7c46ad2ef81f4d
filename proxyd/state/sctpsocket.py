"""Numbers and layouts of the kernel's SCTP sockets (RFC 6458, linux/sctp.h), for control and workers.

The standard library's `socket` has the calls, but none of the numbers. All functions are pure, of bytes.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from typing import NamedTuple

SOL_SCTP = 132  # also the protocol's number

# Options.
INITMSG = 2
NODELAY = 3
EVENTS = 11
STATUS = 14
RECVRCVINFO = 32
BINDX_ADD = 100
BINDX_REM = 101
CONNECTX = 110

# Control messages.
SNDINFO = 2
# Room for one RCVINFO: CMSG_SPACE(28) on 64-bit Linux is 48.
CONTROL_BYTES = 64

MSG_NOTIFICATION = 0x8000
UNORDERED = 1

# Notifications, and the states of an ASSOC_CHANGE.
ASSOC_CHANGE = 0x8001
SHUTDOWN_EVENT = 0x8005
PARTIAL_DELIVERY_EVENT = 0x8006
COMM_LOST = 1
RESTART = 2
SHUTDOWN_COMP = 3

_AF_INET, _AF_INET6 = 2, 10
_INITMSG = struct.Struct("=HHHH")  # streams out, streams in at most, attempts, milliseconds
_RCVINFO = struct.Struct(
    "=HxxHxxI"
)  # stream, (ssn), flags, ppid; tsn, cumulative tsn, context, association follow
_SNDINFO = struct.Struct("=HHIIi")  # stream, flags, ppid, context, association
_NOTIFICATION = struct.Struct("=HHIH")  # type, flags, length; the state of an ASSOC_CHANGE
# Association, state, window, unacknowledged, pending, streams in, streams out, fragmentation point; then the
# primary path: association and address.
_STATUS = struct.Struct("=iiIHHHHIi")
STATUS_BYTES = 176

EVENTS_WANTED = bytes([0, 1, 0, 0, 0, 1, 1, 0, 0, 0])  # association, shutdown, partial delivery


class Status(NamedTuple):
    """The state of an association, from the kernel."""

    streams_in: int
    streams_out: int
    primary: str  # the peer's address in use


def initmsg(streams_out: int, streams_in: int) -> bytes:
    """The value of INITMSG: streams to offer and to admit, 1 to 65535."""
    return _INITMSG.pack(streams_out, streams_in, 0, 0)


def read_initmsg(value: bytes) -> tuple[int, int]:
    """Streams offered and admitted."""
    streams_out, streams_in, _, _ = _INITMSG.unpack(value)
    return streams_out, streams_in


def message_key(rcvinfo: bytes) -> tuple[int, int, int]:
    """Stream, flags and payload protocol identifier of a message, from its RCVINFO.

    The identifier is four bytes as they came from the wire; they are sent on unchanged.
    """
    return _RCVINFO.unpack_from(rcvinfo)


def send_control(key: tuple[int, int, int]) -> list[tuple[int, int, bytes]]:
    """The control message by which a message is sent as it came; see `message_key`."""
    stream, flags, ppid = key
    return [(SOL_SCTP, SNDINFO, _SNDINFO.pack(stream, flags & UNORDERED, ppid, 0, 0))]


def sent_on(control: list[tuple[int, int, bytes]]) -> int:
    """The stream that a control message of `send_control` is for."""
    stream, *_ = _SNDINFO.unpack(control[0][2])
    return int(stream)


def notification(data: bytes | memoryview) -> tuple[int, int]:
    """The type of a notification, and the state in an ASSOC_CHANGE."""
    kind, _, _, state = _NOTIFICATION.unpack_from(data)
    return kind, state


def status(value: bytes) -> Status:
    """The value of STATUS."""
    fields = _STATUS.unpack_from(value)
    return Status(fields[5], fields[6], read_address(value[_STATUS.size :]))


def read_address(sockaddr: bytes) -> str:
    """The IP address in a socket address, as IPv4 if it is mapped into IPv6; "" for another family."""
    family = int.from_bytes(sockaddr[:2], "little" if _LITTLE else "big")
    if family == _AF_INET:
        return str(ipaddress.IPv4Address(sockaddr[4:8]))
    if family == _AF_INET6:
        address = ipaddress.IPv6Address(sockaddr[8:24])
        return str(address.ipv4_mapped or address)
    return ""


def addresses(ips: Iterable[str], port: int) -> bytes:
    """Socket addresses one after the other, as BINDX_ADD, BINDX_REM and CONNECTX take them.

    An IPv6 socket takes IPv4 addresses as they are.

    Raises:
        ValueError: one is not an IP address.
    """
    packed = bytearray()
    for ip in ips:
        address = ipaddress.ip_address(ip)
        if address.version == 4:
            packed += struct.pack("=H", _AF_INET) + struct.pack("!H", port) + address.packed + bytes(8)
        else:
            packed += struct.pack("=H", _AF_INET6) + struct.pack("!HI", port, 0) + address.packed + bytes(4)
    return bytes(packed)


def unmapped(ip: str) -> str:
    """The usual text of an address: an IPv6 socket puts `::ffff:` before IPv4 ones, which is removed."""
    return ip[7:] if ip.startswith("::ffff:") and "." in ip else ip


_LITTLE = struct.pack("=H", 1) == b"\1\0"
