"""Many datagrams in one system call: recvmmsg and sendmmsg through ctypes, over memory that is laid out once.

The work for each datagram touches plain memoryviews only; ctypes makes the one call. A single datagram goes
by the socket's own methods, which cost less than that call (docs/udp.md has the figures).
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
import sys
from _socket import socket as Socket  # noqa: N812 a class
from collections.abc import Callable
from typing import Any

# Datagrams in one call.
SLOTS = 32
# The largest datagram is 65,507 bytes over IPv4, 65,527 over IPv6.
SLOT_BYTES = 65_536

NAME_BYTES = 32  # room for one sockaddr, of 16 (IPv4) or 28 (IPv6) bytes
NAME6_BYTES = 28
_NAME_SIZES = {socket.AF_INET: 16, socket.AF_INET6: NAME6_BYTES}

# Names a client within one listener: the first 8 bytes of its sockaddr_in as a number, or its whole
# sockaddr_in6.
ClientKey = int | bytes
# The same in the form of the socket module: (ip, port), or (ip, port, flow, scope).
ClientName = tuple[Any, ...]


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """Struct msghdr of recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """Struct mmsghdr of recvmmsg(2)."""

    _fields_ = (("header", _Header), ("len", ctypes.c_uint))


# asm-generic/socket.h, linux/sock_diag.h: nine 32-bit numbers, the last is what the socket has dropped.
_SO_MEMINFO = 55
_MEMINFO_BYTES = 36
_DROPS = 8

_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg = _libc.recvmmsg
_recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_sendmmsg = _libc.sendmmsg
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
_NOWAIT = int(socket.MSG_DONTWAIT)
_LEN_STRIDE = ctypes.sizeof(_Message) // 4
_LEN_OFFSET = _Message.len.offset // 4


class MmsgBuffer:
    """Room for SLOTS messages of sockets of one family, either received or queued to be sent.

    `views[i]` is the buffer of slot i; `names` is the memory of all client addresses, and `words` is the same
    memory as 64-bit numbers: `words[4 * i]` is the key of an IPv4 client.

    Args:
        family: AF_INET or AF_INET6.
    """

    def __init__(self, family: int) -> None:
        self.v6 = family == socket.AF_INET6
        self.name_size = _NAME_SIZES[socket.AddressFamily(family)]
        # Only the pages that datagrams have touched take memory.
        self._memory = ctypes.create_string_buffer(SLOTS * SLOT_BYTES)
        self._names = ctypes.create_string_buffer(SLOTS * NAME_BYTES)
        self._iovecs = (_Iovec * SLOTS)()
        self._messages = (_Message * SLOTS)()
        for i in range(SLOTS):
            self._iovecs[i].base = ctypes.addressof(self._memory) + i * SLOT_BYTES
            self._iovecs[i].len = SLOT_BYTES
            message = self._messages[i].header
            message.name = ctypes.addressof(self._names) + i * NAME_BYTES
            message.namelen = self.name_size
            message.iov = ctypes.addressof(self._iovecs[i])
            message.iovlen = 1
        buffer = _bytes_of(self._memory)
        self.views = [buffer[i * SLOT_BYTES : (i + 1) * SLOT_BYTES] for i in range(SLOTS)]
        self.names = _bytes_of(self._names)
        self.words = self.names.cast("Q")
        self.sizes = _bytes_of(self._iovecs).cast("L")  # `sizes[2 * i + 1]`: bytes to send from slot i
        self._received = _bytes_of(self._messages).cast("I")
        self._address = ctypes.addressof(self._messages)
        self.queued = 0  # slots that are filled: buffer, client and size
        self.to = -1  # descriptor to send them by
        self.name: ClientName | None = (
            None  # of the client in the slot that was filled last, where it is known
        )
        self.dropped: dict[int, int] = {}  # datagrams that the kernel refused, by descriptor
        # Called before the first message of a batch is queued; it has to see that `end` is called after the
        # last.
        self.on_first: Callable[[], None] | None = None
        self._sendto: Callable[[memoryview, ClientName], object] | None = None

    def receive(self, fd: int) -> list[int]:
        """Receive the datagrams that are there, at most SLOTS; their sizes, in the order of the slots.

        Raises:
            OSError: not where none is there: that is an empty list.
        """
        count = _recvmmsg(fd, self._address, SLOTS, _NOWAIT, None)
        if count < 0:
            code = ctypes.get_errno()
            if code in (errno.EAGAIN, errno.EINTR):
                return []
            raise OSError(code, "recvmmsg")
        return self._received[_LEN_OFFSET : count * _LEN_STRIDE : _LEN_STRIDE].tolist()

    def key(self, slot: int) -> ClientKey:
        """The key of the client that the datagram in a slot came from."""
        if self.v6:
            return self.names[slot * NAME_BYTES : slot * NAME_BYTES + NAME6_BYTES].tobytes()
        return self.words[slot * 4]

    def queue(self, slot: int, key: ClientKey, name: ClientName, size: int) -> None:
        """Queue the `size` bytes that are in the buffer of `slot`, which is the next free one."""
        if isinstance(key, int):
            self.words[slot * 4] = key
        else:
            self.names[slot * NAME_BYTES : slot * NAME_BYTES + NAME6_BYTES] = key
        self.sizes[2 * slot + 1] = size
        self.name = name
        self.queued = slot + 1

    def turn_to(self, fd: int, sendto: Callable[[memoryview, ClientName], object]) -> None:
        """Send what is queued. Messages are queued from now on for the socket with this descriptor."""
        if self.to < 0 and self.on_first is not None:
            self.on_first()
        self.flush()
        self.to = fd
        self._sendto = sendto

    def lost(self, count: int) -> None:
        """Count datagrams that were not sent."""
        if count:
            self.dropped[self.to] = self.dropped.get(self.to, 0) + count

    def end(self) -> None:
        """Send what is queued, as the batch is over, or the descriptor is about to be closed."""
        self.flush()
        self.to = -1

    def flush(self) -> None:
        """Send what is queued. Messages that the kernel refuses are dropped and counted."""
        first, count = 0, self.queued
        self.queued = 0
        if count == 1 and self.name is not None:
            assert self._sendto is not None
            try:
                self._sendto(self.views[0][: self.sizes[1]], self.name)
            except OSError:
                self.lost(1)
            return
        while first < count:
            address = self._address + first * ctypes.sizeof(_Message)
            sent = _sendmmsg(self.to, address, count - first, _NOWAIT)
            if sent > 0:
                first += sent
            else:
                self.lost(1)
                first += 1


def _bytes_of(array: Any) -> memoryview:
    return memoryview(array).cast("B")


def overruns(sock: Socket) -> int:
    """How many datagrams found no room in a socket's receive buffer since it was made, modulo 2**32."""
    try:
        figures = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO_BYTES)
    except OSError:  # before Linux 4.12
        return 0
    return memoryview(figures).cast("I")[_DROPS]


def client_address(key: ClientKey) -> tuple[str, int]:
    """Address and port of a client."""
    if isinstance(key, int):
        raw = key.to_bytes(8, sys.byteorder)
        return socket.inet_ntop(socket.AF_INET, raw[4:8]), int.from_bytes(raw[2:4], "big")
    return socket.inet_ntop(socket.AF_INET6, key[8:24]), int.from_bytes(key[2:4], "big")


def client_key(name: ClientName) -> ClientKey:
    """The key of a client, from its name."""
    if len(name) == 2:
        raw = _NAME4.pack(socket.AF_INET, name[1].to_bytes(2, "big"), socket.inet_aton(name[0]))
        return int.from_bytes(raw, sys.byteorder)
    ip, port, flow, scope = name
    address = socket.inet_pton(socket.AF_INET6, ip.partition("%")[0])
    return _NAME6.pack(socket.AF_INET6, port.to_bytes(2, "big"), flow.to_bytes(4, "big"), address, scope)


def client_name(key: ClientKey) -> ClientName:
    """The name of a client, from its key."""
    if isinstance(key, int):
        return client_address(key)
    ip, port = client_address(key)
    return ip, port, int.from_bytes(key[4:8], "big"), int.from_bytes(key[24:28], sys.byteorder)


_NAME4 = struct.Struct("=H2s4s")
_NAME6 = struct.Struct("=H2s4s16sI")
