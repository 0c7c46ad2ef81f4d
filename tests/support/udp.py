"""UDP through one real worker process: listeners as control makes them, small servers, and a front to talk to."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from proxyd.api.service import Protocol, TrafficPolicy
from proxyd.host.sockets import open_listener
from proxyd.relay.ipc.messages import BalancerConfig, CloseListener, ListenerConfig
from proxyd.state.spec import BalancerKey, ListenerKey, ListenerSpec, Role, ServicePortName
from tests.support.waiting import DEADLINE
from tests.support.worker import WorkerDriver

Answer = Callable[[bytes], Sequence[bytes]]


def bound(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A UDP socket bound to an address."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    return sock


class UdpServer:
    """Answers each datagram with what `answer` gives for it; remembers from where it was asked."""

    def __init__(self, answer: Answer, host: str = "127.0.0.1", port: int = 0) -> None:
        self.socket = bound(host, port)
        self.host = host
        self.port: int = self.socket.getsockname()[1]
        self.seen: list[bytes] = []
        self.peers: set[tuple[str, int]] = set()
        self._answer = answer
        self._stop = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        self.socket.settimeout(0.05)
        while not self._stop:
            try:
                data, peer = self.socket.recvfrom(1 << 16)
            except TimeoutError:
                continue
            self.seen.append(data)
            self.peers.add(peer[:2])
            for reply in self._answer(data):
                self.socket.sendto(reply, peer)

    def close(self) -> None:
        self._stop = True
        self._thread.join(DEADLINE)
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def named(name: bytes) -> Answer:
    """Answers with its name and what it was asked."""
    return lambda data: [name + b" " + data]


def echo(data: bytes) -> Sequence[bytes]:
    """Gives everything back."""
    return [data]


class UdpFront:
    """A UDP listener of the worker, as a client sees it. The test holds no duplicate of its socket."""

    def __init__(self, number: int, balancer: int, address: tuple[str, int]) -> None:
        self.number = number
        self.balancer = balancer
        self.address = address

    def client(self, timeout: float = DEADLINE) -> socket.socket:
        """A connected client socket."""
        sock = socket.socket(socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(timeout)
        sock.connect(self.address)
        return sock

    def ask(self, data: bytes = b"?", timeout: float = DEADLINE) -> bytes:
        """The answer to one datagram from a new client."""
        with self.client(timeout) as sock:
            return query(sock, data)


def query(sock: socket.socket, data: bytes = b"?") -> bytes:
    """The answer to one datagram.

    Raises:
        OSError: none in time, or refused.
    """
    sock.send(data)
    return sock.recv(1 << 16)


def balancer(
    worker: WorkerDriver,
    servers: Sequence[UdpServer | int],
    *,
    number: int | None = None,
    affinity: int = 0,
    idle: float | None = None,
    first: int = 1000,
    host: str = "127.0.0.1",
) -> int:
    """Set a balancer over these servers (or ports of `host`); counter slot of the i-th is `first + i`."""
    number = worker.id() if number is None else number
    endpoints = [
        (host, server, first + i) if isinstance(server, int) else (server.host, server.port, first + i)
        for i, server in enumerate(servers)
    ]
    config = BalancerConfig(number, "prod/dns", endpoints, affinity, idle)
    worker.apply(balancers=[config])
    return number


def listen(
    worker: WorkerDriver, number: int, *, host: str = "127.0.0.1", port: int = 0, ranges: Sequence[str] = ()
) -> UdpFront:
    """Open a listener for a balancer."""
    name = ServicePortName("prod", "dns", "", Protocol.UDP)
    spec = ListenerSpec(
        key=ListenerKey(host, port, Protocol.UDP),
        balancer=BalancerKey(name, TrafficPolicy.CLUSTER, 6 if ":" in host else 4),
        role=Role.CLUSTER_IP,
    )
    with open_listener(spec) as sock:
        address = sock.getsockname()[:2]
        listener = worker.id()
        text = f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
        config = ListenerConfig(listener, number, "UDP", text, list(ranges))
        worker.apply(listeners=[config], descriptors=[sock.fileno()])
    return UdpFront(listener, number, address)


def close(worker: WorkerDriver, front: UdpFront, drain: float | None = None) -> None:
    """Close a listener."""
    worker.apply(close=[CloseListener(front.number, drain)])


@contextlib.contextmanager
def serving(*answers: Answer, host: str = "127.0.0.1") -> Iterator[list[UdpServer]]:
    """Servers for one test."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(UdpServer(answer, host)) for answer in answers]
