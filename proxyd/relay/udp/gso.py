"""Trains: many datagrams of one sender in one buffer, as UDP_GRO receives them and UDP_SEGMENT sends them (Linux 5.0).

Bulk senders such as QUIC hand the kernel trains, and network cards make them; taken apart they cost four times as much
(docs/udp.md). A socket is switched over when its sender has filled a batch with large datagrams, and stays so: trains that
wait in its buffer could no longer be told from single datagrams.
"""

from __future__ import annotations

import socket
import struct
from _socket import socket as Socket  # noqa: N812 a class
from collections.abc import Iterator

# linux/udp.h
_UDP_SEGMENT, _UDP_GRO = 103, 104
_INT = struct.Struct("=i")
_U16 = struct.Struct("=H")
# Room for the one control message that says how long a datagram of the train is: cmsg(3).
CONTROL_BYTES = socket.CMSG_SPACE(_INT.size)

# A batch of so many datagrams of one client, each at least so large, is bulk.
LENGTH = 8
BULK_BYTES = 500
# Taken from one socket in one turn, before others have theirs.
TURN_BYTES = 256 * 1024

Control = list[tuple[int, int, bytes]]


def start(sock: Socket) -> bool:
    """Receive trains from now on; False where the kernel cannot."""
    try:
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    except OSError:
        return False
    return True


def started(sock: Socket) -> bool:
    """Whether a socket, which another process may have had before, receives trains."""
    try:
        return bool(sock.getsockopt(socket.IPPROTO_UDP, _UDP_GRO))
    except OSError:
        return False


def segment_of(control: Control) -> int:
    """The size of each datagram of a train but the last; 0: it is a single datagram. `control` is from recvmsg."""
    for level, kind, data in control:
        if level == socket.IPPROTO_UDP and kind == _UDP_GRO:
            return int(_INT.unpack_from(data)[0])
    return 0


def control_for(segment: int) -> Control:
    """What sendmsg is given to send a train.

    It fails where such a datagram does not fit through the next link, or the device cannot compute checksums.
    """
    return [(socket.IPPROTO_UDP, _UDP_SEGMENT, _U16.pack(segment))]


def parts(train: memoryview, segment: int) -> Iterator[memoryview]:
    """The datagrams of a train."""
    for first in range(0, len(train), segment):
        yield train[first : first + segment]
