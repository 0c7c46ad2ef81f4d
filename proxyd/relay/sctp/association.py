"""The socket of one association: how it is opened to an endpoint, and what the kernel says of it."""

from __future__ import annotations

import errno
import socket
from _socket import socket as Socket  # noqa: N812 a class; without the Python layer it takes half the memory

from proxyd.relay.engine.balancer import Endpoint
from proxyd.relay.engine.dialling import SHORTAGES
from proxyd.relay.sctp.shared import SO_RCVBUFFORCE, SO_SNDBUFFORCE, Shared
from proxyd.state.sctpsocket import (
    CONNECTX,
    EVENTS,
    EVENTS_WANTED,
    INITMSG,
    NODELAY,
    RECVRCVINFO,
    SOL_SCTP,
    STATUS,
    STATUS_BYTES,
    Status,
    addresses,
    initmsg,
    read_initmsg,
    status,
)

_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
_INITMSG_BYTES = 8
_BUFFERS = ((SO_SNDBUFFORCE, socket.SO_SNDBUF), (SO_RCVBUFFORCE, socket.SO_RCVBUF))
# An association takes a local port for itself, by chance the one that it connects to.
_PORTS_TRIED = 3


class NoRoomError(Exception):
    """A descriptor, memory or a local port is missing: no endpoint is to blame."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def streams_of(sock: Socket) -> tuple[int, int]:
    """Streams of an accepted association, from and to its client.

    Where it has ended by now, its last messages may still wait to be read: then as many as the listener
    admits.
    """
    found = _status(sock)
    if found is None:
        offered, admitted = read_initmsg(sock.getsockopt(SOL_SCTP, INITMSG, _INITMSG_BYTES))
        return admitted, offered
    return found.streams_in, found.streams_out


def primary_address(sock: Socket) -> str:
    """The peer's address that an association uses; "" where the association has ended."""
    found = _status(sock)
    return found.primary if found else ""


def connect(endpoint: Endpoint, first: int, streams: tuple[int, int], shared: Shared) -> Socket:
    """Begin to connect.

    Args:
        endpoint: with one or more addresses.
        first: index, modulo their number, of the address to try first.
        streams: to offer, and to admit.
        shared: by the relays of the worker.

    Returns:
        The socket, non-blocking, whose association is under way.

    Raises:
        NoRoomError: something of our own is missing.
        OSError: the endpoint can't be reached.
    """
    ip, port = endpoint.address
    ips = (ip, *endpoint.further)
    turn = first % len(ips)
    ips = ips[turn:] + ips[:turn]
    family = socket.AF_INET6 if any(":" in one for one in ips) else socket.AF_INET
    for _ in range(_PORTS_TRIED):
        try:
            sock = Socket(family, _STREAM, SOL_SCTP)
        except OSError as error:
            raise _judged(error) from error
        try:
            _prepare(sock, streams, shared)
            try:
                sock.setsockopt(SOL_SCTP, CONNECTX, addresses(ips, port))
            except OSError as error:
                if error.errno != errno.EINPROGRESS:
                    raise
            if sock.getsockname()[1] != port:
                return sock
        except OSError as error:
            sock.close()
            raise _judged(error) from error
        sock.close()
    raise OSError(errno.ECONNREFUSED, "only itself")


def _judged(error: OSError) -> Exception:
    code = error.errno or 0
    if code in SHORTAGES or code == errno.EAGAIN:  # EAGAIN: no local port was free
        return NoRoomError(code)
    return error


def _prepare(sock: Socket, streams: tuple[int, int], shared: Shared) -> None:
    sock.setsockopt(SOL_SCTP, INITMSG, initmsg(*streams))
    sock.setsockopt(SOL_SCTP, NODELAY, 1)
    sock.setsockopt(SOL_SCTP, RECVRCVINFO, 1)
    sock.setsockopt(SOL_SCTP, EVENTS, EVENTS_WANTED)
    # The kernel doubles what it is given.
    for force, plain in _BUFFERS:
        sock.setsockopt(socket.SOL_SOCKET, force if shared.may_force else plain, shared.buffer)


def _status(sock: Socket) -> Status | None:
    """What the kernel says of an association; None where it has ended."""
    try:
        return status(sock.getsockopt(SOL_SCTP, STATUS, STATUS_BYTES))
    except OSError:
        return None
