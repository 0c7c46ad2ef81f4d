"""Listening SCTP sockets, bound to one address or several, with every option that relays inherit.

It is imported when the first SCTP listener is opened, and so only if the feature gate SCTPSupport is on.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable, Sequence

from proxyd.host.routes import is_local
from proxyd.host.sockets import BindFailed, explained, leave_spare
from proxyd.state.sctpsocket import (
    BINDX_ADD,
    BINDX_REM,
    EVENTS,
    EVENTS_WANTED,
    INITMSG,
    NODELAY,
    RECVRCVINFO,
    SOL_SCTP,
    addresses,
    initmsg,
    unmapped,
)
from proxyd.state.spec import ListenerKey, ListenerSpec, Role, SctpOptions

_IPV6_FREEBIND = 78  # linux/in6.h
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h
_BUFFERS = ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF))
_MIN_BUFFER = 1024 * 1024


def open_endpoint(
    specs: Sequence[ListenerSpec], options: SctpOptions, backlog: int
) -> tuple[socket.socket | None, dict[ListenerKey, BindFailed]]:
    """Open one socket, bind it to all addresses that can be bound, and listen.

    Args:
        specs: the listeners that share the socket.
        options: those of all SCTP sockets.
        backlog: the length of the socket's queue of new associations.

    Returns:
        The socket (None if no address could be bound), and the failures.
    """
    failed: dict[ListenerKey, BindFailed] = {}
    try:
        opened = _socket(specs, options)
    except OSError as error:
        return None, {spec.key: _why(error, spec) for spec in specs}
    for spec in specs:
        try:
            add_address(opened, spec)
        except BindFailed as error:
            failed[spec.key] = error
    if len(failed) < len(specs):
        try:
            # Listening begins last: an association gets the addresses that were bound when it began.
            opened.listen(backlog)
        except OSError as error:
            failed |= {spec.key: _why(error, spec) for spec in specs if spec.key not in failed}
    if len(failed) == len(specs):
        opened.close()
        return None, failed
    return opened, failed


def add_address(opened: socket.socket, spec: ListenerSpec) -> None:
    """Bind one more address, also while the socket listens: new associations get it.

    Raises:
        BindFailed: why, and what to do.
    """
    key = spec.key
    if ":" in key.ip and opened.family == socket.AF_INET:
        raise _why(OSError(errno.EAFNOSUPPORT, "IPv4 only"), spec)
    value = addresses([key.ip], key.port)
    try:
        try:
            opened.setsockopt(SOL_SCTP, BINDX_ADD, value)
        except OSError as error:
            # As for TCP: over IPv6 the kernel looks for an address of the node, not for a route.
            if error.errno != errno.EADDRNOTAVAIL or ":" not in key.ip or not is_local(key.ip):
                raise
            opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            try:
                opened.setsockopt(SOL_SCTP, BINDX_ADD, value)
            finally:
                opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 0)
    except OSError as error:
        raise _why(error, spec) from error


def remove_address(opened: socket.socket, key: ListenerKey) -> None:
    """Unbind one of several addresses. Associations that have it keep it.

    Raises:
        OSError: the address is the last one, or is not bound.
    """
    opened.setsockopt(SOL_SCTP, BINDX_REM, addresses([key.ip], key.port))


def bound_to(opened: socket.socket) -> frozenset[str] | None:
    """The addresses that a listening socket is bound to; None without pysctp, which alone can ask."""
    try:
        import _sctp  # noqa: PLC0415 - from the extra `sctp`; its Python layer would make sockets of its own
    except ImportError:
        return None
    try:
        found = _sctp.getladdrs(opened.fileno(), 0)
    except OSError:
        return None
    return frozenset(unmapped(ip) for ip, _ in found)


def _socket(specs: Iterable[ListenerSpec], options: SctpOptions) -> socket.socket:
    flags = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    ips = [spec.key.ip for spec in specs]
    family = max(spec.home.family if spec.home else 6 if ":" in spec.key.ip else 4 for spec in specs)
    try:
        opened = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, flags, SOL_SCTP)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT or all(":" in ip for ip in ips):
            raise
        # A node without IPv6 serves the IPv4 addresses.
        opened = socket.socket(socket.AF_INET, flags, SOL_SCTP)
    try:
        leave_spare(opened)
        if opened.family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(SOL_SCTP, INITMSG, initmsg(options.max_streams, options.max_streams))
        opened.setsockopt(SOL_SCTP, EVENTS, EVENTS_WANTED)
        opened.setsockopt(SOL_SCTP, RECVRCVINFO, 1)
        opened.setsockopt(SOL_SCTP, NODELAY, 1)
        _set_buffers(opened, max(4 * options.max_message, _MIN_BUFFER))
    except OSError:
        opened.close()
        raise
    return opened


def _set_buffers(opened: socket.socket, size: int) -> None:
    for force, plain in _BUFFERS:
        with contextlib.suppress(PermissionError):
            opened.setsockopt(socket.SOL_SOCKET, force, size)
            continue
        # The kernel limits both to net.core.rmem_max and wmem_max.
        opened.setsockopt(socket.SOL_SOCKET, plain, size)


def _why(error: OSError, spec: ListenerSpec) -> BindFailed:
    if error.errno == errno.EADDRNOTAVAIL and spec.role is not Role.CLUSTER_IP:
        return BindFailed(
            f"{spec.key.ip} is not an address of this node, and SCTP can't take single ports of others: "
            "add it to an interface, or leave it out"
        )
    return explained(error, spec.key)
