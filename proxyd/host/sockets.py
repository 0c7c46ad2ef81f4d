"""Opens a socket for a listener spec, with every option that accepted sockets are to inherit."""

from __future__ import annotations

import errno
import os
import resource
import socket

from proxyd.api.service import Protocol
from proxyd.host.holders import holder
from proxyd.host.rights import advice, has
from proxyd.host.routes import is_local
from proxyd.state.spec import ListenerKey, ListenerSpec

# The kernel limits it to net.core.somaxconn (4096 since Linux 5.4).
BACKLOG = 4096

# It takes 60 + 4 * 15 = 120 s to notice that a peer has vanished, and one small packet a minute. Firewalls
# and clouds usually forget idle connections after 5 minutes.
KEEPALIVE_IDLE = 60
KEEPALIVE_INTERVAL = 15
KEEPALIVE_COUNT = 4

# Listeners never get the last so many descriptors: the admin API needs some, and so does starting a worker. A
# worker, which has the same listeners and the same limit, needs them to relay.
SPARE_DESCRIPTORS = 128

# linux/in.h and linux/in6.h; the socket module lacks some of them
_IP_TRANSPARENT = 19
_IP_MTU_DISCOVER, _IP_PMTUDISC_DONT = 10, 0
_IPV6_TRANSPARENT = 75
_IPV6_FREEBIND = 78
_IP_FREEBIND = 15

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# The buffer of a UDP listener has room for some 10,000 small datagrams, or 60 of the largest.
_UDP_BUFFER = 4 * 1024 * 1024
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h


class BindFailed(Exception):  # noqa: N818 - it reads as what happened, in the status and at its raise
    """A listener could not be opened.

    Attributes:
        message: why, and what to do, in one line.
        retryable: whether it may work later without a change of proxyd's own privileges or settings.
        exhausted: whether other listeners can't be opened either: descriptors or memory ran out, or the
            kernel lacks the protocol.
        taken: whether somebody else has the address.
    """

    def __init__(
        self, message: str, *, retryable: bool = True, exhausted: bool = False, taken: bool = False
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retryable = retryable
        self.exhausted = exhausted
        self.taken = taken


def open_listener(
    spec: ListenerSpec, backlog: int = BACKLOG, *, parked_at: int | None = None
) -> socket.socket:
    """Open, bind and (not for UDP) listen. SCTP: see `proxyd.host.sctp`.

    The socket is non-blocking and close-on-exec. A TCP socket has TCP_NODELAY and keepalive, which accepted
    sockets inherit, and SO_REUSEADDR, so that old connections do not hold up a restart. SO_REUSEPORT is never
    set: it would hide conflicts. An IPv6 socket takes IPv6 only. A steered one is transparent, as its address
    is not the node's.

    Args:
        spec: what is wished for.
        backlog: of connections that nobody has accepted yet.
        parked_at: the port to bind in place of the listener's own (see `proxyd.host.parked`), also before its
            address is local.

    Raises:
        BindFailed: why, and what to do.
    """
    key = spec.key if parked_at is None else spec.key._replace(port=parked_at)
    family = socket.AF_INET6 if ":" in key.ip else socket.AF_INET
    opened: socket.socket | None = None
    try:
        opened = _socket(family, key.protocol)
        leave_spare(opened)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if spec.steered:
            _make_transparent(opened, family, key)
            ignore_path_mtu(opened, key)
        if parked_at is not None:
            _free(opened, family)
        _bind(opened, key)
        if key.protocol is not Protocol.UDP:
            opened.listen(backlog)
    except BindFailed:
        if opened is not None:
            opened.close()
        raise
    except OSError as error:
        if opened is not None:
            opened.close()
        if parked_at is not None and error.errno == errno.EADDRINUSE:
            raise BindFailed(f"port {parked_at} is taken", taken=True) from error  # there are others
        raise explained(error, key) from error
    return opened


def _socket(family: int, protocol: Protocol) -> socket.socket:
    flags = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    if protocol is Protocol.UDP:
        # A UDP socket has no SO_REUSEADDR: it would let another process take the port away.
        opened = socket.socket(family, socket.SOCK_DGRAM | flags)
        for force, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                opened.setsockopt(socket.SOL_SOCKET, force, _UDP_BUFFER)
            except PermissionError:
                # The kernel limits both to net.core.rmem_max and wmem_max.
                opened.setsockopt(socket.SOL_SOCKET, plain, _UDP_BUFFER)
        return opened
    opened = socket.socket(family, socket.SOCK_STREAM | flags, socket.IPPROTO_TCP)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    return opened


def leave_spare(opened: socket.socket) -> None:
    """Raises EMFILE when few descriptors are left: the socket has the lowest number that was free."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if opened.fileno() >= limit - SPARE_DESCRIPTORS:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _make_transparent(opened: socket.socket, family: int, key: ListenerKey) -> None:
    try:
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        else:
            opened.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
    except PermissionError as error:
        raise BindFailed(
            f"{key.ip} is not an address of this node, and may not be bound: {advice('CAP_NET_ADMIN')}",
            retryable=False,
        ) from error


def _free(opened: socket.socket, family: int) -> None:
    """Let it bind an address that is not local yet."""
    if family == socket.AF_INET6:
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    else:
        opened.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)


def ignore_path_mtu(opened: socket.socket, key: ListenerKey) -> None:
    """Have a UDP socket's replies from a foreign IPv4 address cut where they are too large for their way.

    The kernel can't learn of a smaller path MTU there: it looks for the route as if no such address could
    send.
    """
    if key.protocol is Protocol.UDP and opened.family == socket.AF_INET:
        opened.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)


def _bind(opened: socket.socket, key: ListenerKey) -> None:
    try:
        opened.bind((key.ip, key.port))
    except OSError as error:
        # Over IPv6 the kernel looks for an address of the node, not for a route. Free binding skips that
        # check, so the route is looked for here: without one nobody would reach the listener.
        if error.errno != errno.EADDRNOTAVAIL or ":" not in key.ip or not is_local(key.ip):
            raise
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        opened.bind((key.ip, key.port))


def explained(error: OSError, key: ListenerKey) -> BindFailed:
    """The failure to open a listener, with a text for the operator."""
    match error.errno:
        case errno.EADDRINUSE:
            found = holder(key)
            if found.peer:
                # The kernel gives such a port out by itself.
                return BindFailed(
                    f"in use by {found}: `sysctl net.ipv4.ip_local_reserved_ports` keeps ports for listeners",
                    taken=True,
                )
            who = str(found) or "another process"
            return BindFailed(f"in use by {who}: stop it, or bind it to other addresses", taken=True)
        case errno.EACCES:
            return BindFailed(
                f"port {key.port} is privileged: {advice('CAP_NET_BIND_SERVICE')}; "
                f"or `sysctl net.ipv4.ip_unprivileged_port_start={key.port}`"
            )
        case errno.EADDRNOTAVAIL:
            what = f"{key.ip} is not an address of this node"
            if has("CAP_NET_ADMIN"):
                return BindFailed(f"{what}: give it to an interface, or use --vip-mode=route if it is a VIP")
            return BindFailed(f"{what}: {advice('CAP_NET_ADMIN')}; or use --vip-mode=loopback if it is a VIP")
        case errno.EMFILE:
            return BindFailed(
                "out of file descriptors: raise LimitNOFILE= of the unit (or `ulimit -n`)", exhausted=True
            )
        case errno.ENFILE:
            return BindFailed(
                "the whole system is out of file descriptors: raise `sysctl fs.file-max`", exhausted=True
            )
        case errno.EPROTONOSUPPORT | errno.ESOCKTNOSUPPORT:
            if key.protocol is Protocol.SCTP:
                return BindFailed("the kernel has no SCTP (modprobe sctp)", exhausted=True)
            return BindFailed(f"the kernel has no {key.protocol}", retryable=False)
        case errno.EAFNOSUPPORT:
            what = "IPv6" if ":" in key.ip else "IPv4"
            return BindFailed(f"{what} is not available: the kernel or a sandbox forbids it", retryable=False)
        case errno.EPERM:
            return BindFailed(f"binding {key} is not permitted here (a security policy)", retryable=False)
    reason = os.strerror(error.errno) if error.errno else str(error)
    return BindFailed(f"cannot bind {key}: {reason}", exhausted=error.errno in _EXHAUSTED)
