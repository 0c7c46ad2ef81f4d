"""Netlink, synchronously: batches of requests, with an answer for each, and dumps.

The messages that proxyd needs are few, and part of the kernel's ABI, so they are written by hand: a library
on top of asyncio cannot be called from code that runs in the event loop.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from proxyd.host.rights import advice

NETLINK_ROUTE = 0
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12

# linux/netlink.h
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLMSGERR_ATTR_MSG = 1
_NLM_F_REQUEST = 0x1
_NLM_F_ACK = 0x4
_NLM_F_DUMP_INTR = 0x10
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLM_F_DUMP = 0x300
_NFNL_MSG_BATCH_BEGIN, _NFNL_MSG_BATCH_END = 0x10, 0x11  # linux/netfilter/nfnetlink.h
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_GETNEIGH = 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type

# Requests in one datagram. Each may fail, and all answers must fit into the default receive buffer: 212,992
# bytes, of which the kernel charges about 1 KiB for each.
_BATCH = 128
_TIMEOUT = 10.0  # seconds; the kernel normally answers before the send returns
_DUMP_RETRIES = 5
_RECEIVE = 1 << 16
_REMEMBERED = 256  # port ids; more than a reconcile uses


# Port ids of the sockets that this process changed something with last, the latest at the end.
_own: dict[int, None] = {}


def note_own(port: int) -> None:
    """Note that a socket with this port id is of this process, or of a program that it runs."""
    _own.pop(port, None)
    _own[port] = None
    if len(_own) > _REMEMBERED:
        del _own[next(iter(_own))]


def is_own(port: int) -> bool:
    """Whether what was changed by a socket with this port id was changed by proxyd."""
    return port in _own


class Message(NamedTuple):
    """A request (its flags without REQUEST and ACK), or one object of a dump."""

    kind: int
    body: bytes
    flags: int = 0


class Failure(NamedTuple):
    """Why the kernel refused a request: errno, and one line of text."""

    errno: int
    text: str


def attribute(kind: int, payload: bytes) -> bytes:
    """An attribute, padded to a multiple of four bytes."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def u32(value: int) -> bytes:
    """A 32-bit number in this machine's byte order."""
    return struct.pack("=I", value)


def attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """The attributes of a message body from `offset` on, by type; see `attribute_list`."""
    return dict(attribute_list(data, offset))


def attribute_list(data: bytes, offset: int = 0) -> list[tuple[int, bytes]]:
    """The attributes from `offset` on, in order: type (without its flags) and payload."""
    found = []
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        found.append((kind & 0x3FFF, data[offset + 4 : offset + length]))
        offset += (length + 3) & ~3
    return found


def packed(ip: str) -> tuple[int, bytes]:
    """The family of an address, and its bytes in network order.

    Raises:
        ValueError: `ip` is not an IPv4 or IPv6 address.
    """
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        return family, socket.inet_pton(family, ip)
    except OSError:
        raise ValueError(f"{ip!r} is not an IP address") from None


def unpacked(address: bytes) -> str:
    """The canonical text of an address of 4 or 16 bytes in network order."""
    return str(ipaddress.ip_address(address))


class Netlink:
    """A netlink socket in the network namespace of the calling thread: a context manager for one thread.

    Raises:
        OSError: a sandbox forbids netlink, or no descriptor is left.
    """

    __slots__ = ("_sequence", "_socket")

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.bind((0, 0))
            note_own(self._socket.getsockname()[0])
            self._socket.settimeout(_TIMEOUT)
            for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
                try:
                    self._socket.setsockopt(_SOL_NETLINK, option, 1)
                except OSError as error:
                    if error.errno != errno.ENOPROTOOPT:  # an older kernel explains errors less
                        raise
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def batch(self, messages: Sequence[Message]) -> list[Failure | None]:
        """Send all requests, in order; one that fails does not stop the others.

        Returns:
            None for each request, or why it failed.

        Raises:
            OSError: the socket itself failed.
        """
        results: list[Failure | None] = [None] * len(messages)
        for start in range(0, len(messages), _BATCH):
            part = messages[start : start + _BATCH]
            first = self._sequence + 1
            self._sequence += len(part)
            # The kernel answers every failure. Only the last request asks for an answer to its success.
            self._socket.send(
                b"".join(
                    self._encode(message, first + i, _NLM_F_ACK if i == len(part) - 1 else 0)
                    for i, message in enumerate(part)
                )
            )
            done = False
            while not done:
                for kind, flags, sequence, body in self._receive():
                    if kind != _NLMSG_ERROR or not first <= sequence <= self._sequence:
                        continue
                    results[start + sequence - first] = _failure(body, flags)
                    done = done or sequence == self._sequence
        return results

    def one(self, message: Message) -> Failure | None:
        """Send one request; see `batch`."""
        return self.batch([message])[0]

    def transact(self, subsystem: int, message: Message) -> Failure | None:
        """Carry out one message as a transaction of netfilter.

        Returns:
            None, or why it failed.

        Raises:
            OSError: the socket itself failed.
        """
        head = struct.pack("=BBH", socket.AF_UNSPEC, 0, socket.htons(subsystem))
        begin, end = Message(_NFNL_MSG_BATCH_BEGIN, head), Message(_NFNL_MSG_BATCH_END, head)
        first = self._sequence + 1
        self._sequence += 3
        self._socket.send(
            self._encode(begin, first, 0)
            + self._encode(message, first + 1, _NLM_F_ACK)
            + self._encode(end, first + 2, 0)
        )
        while True:
            for kind, flags, sequence, body in self._receive():
                if kind == _NLMSG_ERROR and sequence in (first, first + 1):
                    failure = _failure(body, flags)
                    if failure is not None or sequence == first + 1:
                        return failure

    def dump(self, message: Message, most: int = 0) -> list[Message]:
        """All objects of a kind, or the first `most` of them; the socket is of no use after that.

        Raises:
            OSError: the kernel refused, or the socket failed.
        """
        for _ in range(_DUMP_RETRIES):
            found = self._dump(message, most)
            if found is not None:
                return found
        raise OSError(errno.EAGAIN, "the kernel's tables change too fast to be read")

    def get(self, message: Message) -> Message:
        """The one object that the request asks for.

        Raises:
            OSError: the kernel refused, with its errno, or the socket failed.
        """
        self._sequence += 1
        self._socket.send(self._encode(message, self._sequence, 0))
        while True:
            for kind, flags, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue
                if kind == _NLMSG_ERROR:
                    failure = _failure(body, flags)
                    if failure is not None:
                        raise OSError(*failure)
                    continue
                return Message(kind, body)

    def _dump(self, message: Message, most: int) -> list[Message] | None:
        self._sequence += 1
        self._socket.send(self._encode(message, self._sequence, _NLM_F_DUMP))
        found: list[Message] = []
        interrupted = False
        while True:
            for kind, flags, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(flags & _NLM_F_DUMP_INTR)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    # DONE has an errno as well, but no copy of the request.
                    failure = _failure(body, flags | _NLM_F_CAPPED) if len(body) >= 4 else None
                    if failure is not None:
                        raise OSError(*failure)
                    return None if interrupted else found
                found.append(Message(kind, body))
                if len(found) == most:
                    return found

    @staticmethod
    def _encode(message: Message, sequence: int, flags: int) -> bytes:
        body = message.body
        flags |= _NLM_F_REQUEST | message.flags
        return _HEADER.pack(16 + len(body), message.kind, flags, sequence, 0) + body + bytes(-len(body) % 4)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        data = self._socket.recv(_RECEIVE)
        offset = 0
        while offset + 16 <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            if length < 16:
                break
            yield kind, flags, sequence, data[offset + 16 : offset + length]
            offset += (length + 3) & ~3


def _failure(body: bytes, flags: int) -> Failure | None:
    code = -struct.unpack_from("=i", body)[0]
    if not code:
        return None
    text = os.strerror(code)
    if code in (errno.EPERM, errno.EACCES):
        return Failure(code, f"{text}: {advice('CAP_NET_ADMIN')}")
    if flags & _NLM_F_ACK_TLVS and flags & _NLM_F_CAPPED and len(body) > 20:
        detail = attributes(body, 20).get(_NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode("utf-8", "replace")
        if detail:
            text = f"{text}: {detail}"
    return Failure(code, text)
