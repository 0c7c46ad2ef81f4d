"""What the tests of the host room talk with: servers that name themselves and their client, and one question."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import selectors
import socket
import threading
from typing import Self

from proxyd.api.service import Protocol, TrafficPolicy
from proxyd.state.spec import BalancerKey, ListenerKey, ListenerSpec, Role, ServicePortName
from tests.support.netlab import Namespace

REFUSED = "refused"
UNREACHABLE = "unreachable"
FORBIDDEN = "forbidden"
SILENCE = "silence"
# In struct tcp_info of linux/tcp.h.
_RETRANSMITS = 2


def key(ip: str, port: int, protocol: str = "TCP") -> ListenerKey:
    return ListenerKey(ip, port, Protocol(protocol))


def spec(ip: str, port: int, protocol: str = "TCP", *, steered: bool = False) -> ListenerSpec:
    service = ServicePortName("default", "web", "", Protocol(protocol))
    balancer = BalancerKey(service, TrafficPolicy.CLUSTER, 6 if ":" in ip else 4)
    return ListenerSpec(key=key(ip, port, protocol), balancer=balancer, role=Role.CLUSTER_IP, steered=steered)


def daemon_socket(namespace: Namespace, ip: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A socket as ordinary daemons have it, such as sshd on all addresses."""
    made = namespace.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind)
    try:
        if ":" in ip:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((ip, port))
        if kind == socket.SOCK_STREAM:
            made.listen()
    except BaseException:
        made.close()
        raise
    return made


class Naming:
    """Answers every connection and datagram with `NAME CLIENT-IP`. Owns its sockets and one thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop, self._stopped = socket.socketpair()
        self._selector.register(self._stopped, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="naming")
        self._thread.start()

    def add(self, server: socket.socket, name: str) -> None:
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ, name)

    def _run(self) -> None:
        while True:
            for ready, _ in self._selector.select():
                server, name = ready.fileobj, ready.data
                if name is None:
                    return
                assert isinstance(server, socket.socket)
                # The client may have gone.
                with contextlib.suppress(OSError):
                    if server.type == socket.SOCK_DGRAM:
                        _, peer = server.recvfrom(2048)
                        server.sendto(f"{name} {peer[0]}".encode(), peer)
                    else:
                        accepted, peer = server.accept()
                        with accepted:
                            accepted.sendall(f"{name} {peer[0]}".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.send(b"x")
        self._thread.join()
        for registered in list(self._selector.get_map().values()):
            assert isinstance(registered.fileobj, socket.socket)
            registered.fileobj.close()
        self._stop.close()
        self._selector.close()


def _connect(client: socket.socket, address: tuple[str, int]) -> None:
    """Connect.

    Raises:
        TimeoutError: the SYN had to be sent again.
        OSError: as connect(2) says.
    """
    client.setblocking(False)
    error = client.connect_ex(address)
    while error == errno.EINPROGRESS:
        if select.select([], [client], [], 0.01)[1]:
            error = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        elif client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[_RETRANSMITS]:
            raise TimeoutError
    if error:
        raise OSError(error, os.strerror(error))


def question(
    namespace: Namespace,
    ip: str,
    port: int,
    protocol: str = "TCP",
    *,
    connected: bool = True,
    source: str = "",
) -> str:
    """The answer of a Naming server, or REFUSED, FORBIDDEN, UNREACHABLE, SILENCE.

    What answers a connection has to answer its first SYN: where that is sent again it is SILENCE, though an answer may
    come later. Without `connected` a UDP client uses sendto, as some resolvers do.
    """
    kind = socket.SOCK_DGRAM if protocol == "UDP" else socket.SOCK_STREAM
    with namespace.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind) as client:
        try:
            if source:
                client.bind((source, 0))
            if protocol == "TCP":
                _connect(client, (ip, port))
            elif connected:
                client.connect((ip, port))
            client.settimeout(10)  # the server is a thread of this process
            if protocol == "UDP" and connected:
                client.send(b"?")
            elif protocol == "UDP":
                client.sendto(b"?", (ip, port))
            return client.recv(2048).decode()
        except TimeoutError:
            return SILENCE
        except ConnectionRefusedError:
            return REFUSED
        except PermissionError:
            return FORBIDDEN
        except OSError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.ENETUNREACH):
                raise
            return UNREACHABLE
