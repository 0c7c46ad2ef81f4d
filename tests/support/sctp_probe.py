"""A peer that sees all of SCTP: one association, with every message's stream, order and identifier, and how it ended.

Plain sockets carry the messages (RFC 6458, linux/sctp.h); nothing here comes from proxyd.
"""

from __future__ import annotations

import contextlib
import ipaddress
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Self

from tests.support.netlab import Namespace
from tests.support.waiting import PATIENCE

SCTP = 132  # the protocol, and the level of its options
INITMSG, NODELAY, PEER_ADDR_PARAMS, EVENTS, STATUS, RECVRCVINFO = 2, 3, 9, 11, 14, 32
BINDX_ADD, GET_PEERS, CONNECTX = 100, 108, 110
SNDINFO, RCVINFO = 2, 3
UNORDERED = 1
NOTIFICATION = 0x8000
ASSOC_CHANGE, SHUTDOWN_EVENT = 0x8001, 0x8005
COMM_LOST, SHUTDOWN_COMPLETE = 1, 3

TIMEOUT = 20.0 * PATIENCE  # of each call
BUFFER = 1 << 20
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33

_RCVINFO = struct.Struct("=HHHxx4s")  # stream, sequence number, flags, identifier; the rest is not looked at
_SNDINFO = struct.Struct("=HH4sIi")
_STATUS = struct.Struct("=iiIHHHHIi")
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s


class End(Enum):
    """How an association ended."""

    SHUTDOWN = "shut down"
    ABORT = "aborted"


class Message(NamedTuple):
    """A whole message; `ppid` is its payload protocol identifier, four bytes as on the wire."""

    data: bytes
    stream: int = 0
    ppid: bytes = bytes(4)
    unordered: bool = False


@dataclass(frozen=True)
class Streams:
    """How many streams an association has at this end."""

    incoming: int
    outgoing: int


class Association:
    """One association. All calls block, and raise TimeoutError after a while."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.settimeout(TIMEOUT)
        self.events: list[int] = []
        self._buffer = bytearray(BUFFER)
        self._parts: list[bytes] = []
        self._ended: End | None = None

    def send(self, *messages: Message) -> None:
        """Send messages, each whole."""
        for data, stream, ppid, unordered in messages:
            info = _SNDINFO.pack(stream, UNORDERED if unordered else 0, ppid, 0, 0)
            self.socket.sendmsg([data], [(SCTP, SNDINFO, info)])

    def receive(self) -> Message | End:
        """The next message, or how the association ended; of a message that was cut off nothing."""
        view = memoryview(self._buffer)
        while self._ended is None:
            try:
                size, control, flags, _ = self.socket.recvmsg_into([view], 64)
            except (ConnectionResetError, ConnectionAbortedError):
                self._ended = End.ABORT
                break
            if flags & NOTIFICATION:
                self._notified(view[:size])
            elif not size:
                self._ended = End.SHUTDOWN
            else:
                self._parts.append(bytes(view[:size]))
                if flags & socket.MSG_EOR:
                    stream, _, how, ppid = _RCVINFO.unpack_from(control[0][2])
                    data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                    self._parts.clear()
                    return Message(data, stream, ppid, bool(how & UNORDERED))
        return self._ended

    def _notified(self, data: memoryview) -> None:
        kind, _, _, state = struct.unpack_from("=HHIH", data)
        self.events.append(kind)
        if kind == ASSOC_CHANGE and state == COMM_LOST:
            self._ended = End.ABORT
        elif kind == ASSOC_CHANGE and state == SHUTDOWN_COMPLETE:
            # Whoever began it is not told in any other way.
            self._ended = End.SHUTDOWN

    def receive_all(self, count: int) -> list[Message]:
        """That many messages.

        Raises:
            AssertionError: it ended before.
        """
        received = []
        for number in range(count):
            message = self.receive()
            assert isinstance(message, Message), f"{message.value} after {number} of {count} messages"
            received.append(message)
        return received

    def rest(self) -> tuple[list[Message], End]:
        """What comes up to the end, and which it was."""
        messages = []
        while isinstance(message := self.receive(), Message):
            messages.append(message)
        return messages, message

    def shut_down(self) -> None:
        """Begin a graceful end: what was sent is delivered, nothing can be sent any more."""
        self.socket.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """End at once."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self.socket.close()

    def close(self) -> None:
        """Close the socket. With everything read that is a graceful end."""
        self.socket.close()

    def streams(self) -> Streams:
        """How many streams there are."""
        fields = _STATUS.unpack_from(self.socket.getsockopt(SCTP, STATUS, 176))
        return Streams(incoming=fields[5], outgoing=fields[6])

    def peers(self) -> set[str]:
        """All addresses of the other side."""
        raw = self.socket.getsockopt(SCTP, GET_PEERS, 1024)
        _, count = struct.unpack_from("=iI", raw)
        found, at = set(), 8
        for _ in range(count):
            (family,) = struct.unpack_from("=H", raw, at)
            ip = raw[at + 4 : at + 8] if family == socket.AF_INET else raw[at + 8 : at + 24]
            found.add(_readable(ip))
            at += 16 if family == socket.AF_INET else 28
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _readable(ip: bytes) -> str:
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _sockaddrs(ips: Sequence[str], port: int) -> bytes:
    """Addresses as BINDX_ADD and CONNECTX take them."""
    packed = b""
    for ip in ips:
        raw = ipaddress.ip_address(ip).packed
        if len(raw) == 4:
            packed += struct.pack("=H", socket.AF_INET) + port.to_bytes(2, "big") + raw + bytes(8)
        else:
            packed += struct.pack("=H", socket.AF_INET6) + port.to_bytes(2, "big") + bytes(4) + raw + bytes(4)
    return packed


def new_socket(family: int, *, outgoing: int, incoming: int, buffer: int = BUFFER) -> socket.socket:
    """A socket in this thread's namespace that asks for this many streams, and tells all that `Association` wants."""
    sock = socket.socket(family, socket.SOCK_STREAM, SCTP)
    try:
        sock.setsockopt(SCTP, INITMSG, struct.pack("=HHHH", outgoing, incoming, 0, 0))
        sock.setsockopt(SCTP, NODELAY, 1)
        sock.setsockopt(SCTP, RECVRCVINFO, 1)
        # Associations, shutdowns, broken off messages.
        sock.setsockopt(SCTP, EVENTS, bytes([0, 1, 0, 0, 0, 1, 1, 0, 0, 0]))
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, buffer)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer)
    except BaseException:
        sock.close()
        raise
    return sock


def _family(ips: Sequence[str]) -> int:
    return socket.AF_INET6 if any(":" in ip for ip in ips) else socket.AF_INET


class Server:
    """A listening socket in a namespace, with one address or several.

    The kernel makes tables of all its streams for each association; for 65,535 of them that takes most of the time.
    """

    def __init__(
        self,
        namespace: Namespace,
        *ips: str,
        port: int = 0,
        outgoing: int = 1024,
        incoming: int = 1024,
        buffer: int = BUFFER,
    ) -> None:
        made: Callable[..., socket.socket] = new_socket
        self.socket = namespace.call(made, _family(ips), outgoing=outgoing, incoming=incoming, buffer=buffer)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((ips[0], port))
            self.port: int = self.socket.getsockname()[1]
            if len(ips) > 1:
                self.socket.setsockopt(SCTP, BINDX_ADD, _sockaddrs(ips[1:], self.port))
            self.socket.listen(1024)
            self.socket.settimeout(TIMEOUT)
        except BaseException:
            self.socket.close()
            raise
        self.ip = ips[0]

    def accept(self) -> Association:
        """The next association."""
        return Association(self.socket.accept()[0])

    def waiting(self, seconds: float) -> bool:
        """Whether an association comes in that time."""
        self.socket.settimeout(seconds)
        try:
            self.accept().close()
        except TimeoutError:
            return False
        finally:
            self.socket.settimeout(TIMEOUT)
        return True

    def close(self) -> None:
        """Listen no more."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Echo:
    """Answers every message of every association with itself, in one thread."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._selector = selectors.DefaultSelector()
        self._selector.register(server.socket, selectors.EVENT_READ, None)
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            for ready, _ in self._selector.select(0.2):
                if ready.data is None:
                    association = self._server.accept()
                    association.socket.setblocking(False)
                    self._selector.register(association.socket, selectors.EVENT_READ, association)
                elif not self._answer(ready.data):
                    self._selector.unregister(ready.data.socket)
                    ready.data.close()

    @staticmethod
    def _answer(association: Association) -> bool:
        """Answer what there is; False where the association has ended."""
        try:
            while isinstance(message := association.receive(), Message):
                association.send(message)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        for ready in list(self._selector.get_map().values()):
            if ready.data is not None:
                ready.data.close()
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(
    namespace: Namespace,
    ip: str,
    port: int,
    *,
    outgoing: int = 10,
    incoming: int = 10,
    source: Sequence[str] = (),
    buffer: int = BUFFER,
) -> Association:
    """A new association from a namespace to an address.

    Args:
        namespace: where the client is.
        ip: of the server.
        port: of the server.
        outgoing: streams to ask for.
        incoming: streams to admit at most.
        source: own addresses; all of the host's where none is given.
        buffer: bytes of each of the socket's buffers, which the kernel doubles.

    Raises:
        OSError: it was refused, or nobody answered.
    """
    made: Callable[..., socket.socket] = new_socket
    family = _family([ip, *source])
    sock = namespace.call(made, family, outgoing=outgoing, incoming=incoming, buffer=buffer)
    try:
        sock.settimeout(TIMEOUT)
        if source:
            sock.bind((source[0], 0))
            if len(source) > 1:
                sock.setsockopt(SCTP, BINDX_ADD, _sockaddrs(source[1:], sock.getsockname()[1]))
        sock.connect((ip, port))
        return Association(sock)
    except BaseException:
        sock.close()
        raise


def quietly(call: Callable[..., Any], *arguments: Any) -> None:
    """Call it; that the other side is gone already is no error."""
    with contextlib.suppress(OSError):
        call(*arguments)
