"""UDP GSO and GRO: many datagrams of one sender in one buffer, as its *segments*.

UDP_GRO receives such buffers, UDP_SEGMENT sends them (Linux 5.0). Bulk senders such as QUIC hand them to the
kernel, and network cards make them; segments that are taken apart cost four times as much (docs/udp.md). GRO
is switched on for a socket when its sender has filled a batch with large datagrams, and stays on: segments
that wait in its buffer could no longer be told from one datagram.
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
# Room for the one control message, which says how long a segment is: cmsg(3).
CONTROL_BYTES = socket.CMSG_SPACE(_INT.size)

# A batch of this many datagrams of one client, each at least this large, is bulk.
BULK_BATCH = 8
BULK_BYTES = 500
# A socket that has brought this much in one turn waits until the others had theirs.
TURN_BYTES = 256 * 1024

Control = list[tuple[int, int, bytes]]


def enable_gro(sock: Socket) -> bool:
    """Receive segments from now on; False where the kernel cannot."""
    try:
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    except OSError:
        return False
    return True


def gro_enabled(sock: Socket) -> bool:
    """Whether a socket receives segments: another process may have had it before."""
    try:
        return bool(sock.getsockopt(socket.IPPROTO_UDP, _UDP_GRO))
    except OSError:
        return False


def segment_size(control: Control) -> int:
    """Bytes of each segment but the last, from the `control` that recvmsg returned; 0: it is one datagram."""
    for level, kind, data in control:
        if level == socket.IPPROTO_UDP and kind == _UDP_GRO:
            return int(_INT.unpack_from(data)[0])
    return 0


def control_for(size: int) -> Control:
    """What sendmsg takes beside a buffer to send it in segments of `size` bytes.

    Sending fails where such a datagram does not fit through the next link, or the device cannot compute
    checksums.
    """
    return [(socket.IPPROTO_UDP, _UDP_SEGMENT, _U16.pack(size))]


def segments(data: memoryview, size: int) -> Iterator[memoryview]:
    """The datagrams in a buffer whose segments have `size` bytes."""
    for first in range(0, len(data), size):
        yield data[first : first + size]
