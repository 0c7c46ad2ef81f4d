"""An endpoint at an address of the node whose port is one of those the kernel gives to outgoing connections.

Where nobody listens at it, a dial that gets this very port is connected to itself, and the client would read back
what it sends. The namespace has a single port to give, so that every dial meets itself.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from proxyd.relay.ipc import slots as s
from tests.support import udp
from tests.support.netlab import Namespace
from tests.support.worker import RESET_ON_CLOSE, WorkerDriver, echo, read_all

# Also below the range that is the default, 32768 to 60999. The range changes while the worker runs.
PORTS = (1100, 12_000, 45_000)
ADDRESSES = ("127.0.0.1", "::1", "10.9.9.9")


@pytest.fixture
def node() -> Iterator[Namespace]:
    with Namespace("self") as one:
        one.ip("addr add 10.9.9.9/32 dev lo")
        yield one


def give_only(node: Namespace, port: int) -> None:
    node.sysctl(net__ipv4__ip_local_port_range=f"{port} {port}")


@contextlib.contextmanager
def client(node: Namespace, kind: int, address: tuple[str, int]) -> Iterator[socket.socket]:
    """A client whose port is none that the kernel gives, and free again at once."""
    with node.socket(socket.AF_INET, kind) as sock:
        sock.settimeout(30)
        sock.bind(("127.0.1.1", 5000))
        sock.connect(address)
        yield sock
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def test_a_relay_never_meets_itself(node: Namespace) -> None:
    with node.call(WorkerDriver) as worker:
        live = node.call(worker.serve, echo)
        dead = worker.balancer([])
        front = node.call(worker.listener, dead)
        for port in PORTS:
            give_only(node, port)
            for ip in ADDRESSES:
                worker.balancer([(ip, port)], number=dead)
                failed = worker.total(1000, s.FAILED)
                with (
                    contextlib.suppress(ConnectionResetError),
                    client(node, socket.SOCK_STREAM, front.address) as sock,
                ):
                    sock.sendall(b"is it me?")
                    assert read_all(sock) == b"", (ip, port)
                assert worker.total(1000, s.FAILED) == failed + 1, (ip, port)
        assert worker.total(1000, s.OPENED) == 0
        # Another endpoint serves the client, as with any that refuses.
        worker.balancer([("127.0.0.1", PORTS[-1]), live.port], number=dead, first=2000)
        for _ in range(3):
            with client(node, socket.SOCK_STREAM, front.address) as sock:
                sock.sendall(b"hello")
                assert sock.recv(5) == b"hello"
        assert worker.total(2000, s.FAILED) > 0
        assert worker.total(2001, s.OPENED) == 3


def test_a_flow_never_meets_itself(node: Namespace) -> None:
    with node.call(WorkerDriver) as worker, node.call(udp.UdpServer, udp.named(b"live")) as live:
        for port in PORTS:
            give_only(node, port)
            for ip in ADDRESSES:
                front = node.call(udp.listen, worker, udp.balancer(worker, [port], host=ip), port=5353)
                failed = worker.total(1000, s.FAILED)
                with client(node, socket.SOCK_DGRAM, front.address) as sock:
                    sock.send(b"is it me?")
                    worker.wait(lambda failed=failed: worker.total(1000, s.FAILED) > failed)  # type: ignore[misc]  # mypy takes no default of a lambda
                udp.close(worker, front)
        assert worker.total(1000, s.OPENED) == 0
        both = udp.balancer(worker, [PORTS[-1], live], first=2000)
        front = node.call(udp.listen, worker, both, port=5353)
        for _ in range(3):
            with client(node, socket.SOCK_DGRAM, front.address) as sock:
                assert udp.query(sock, b"hello") == b"live hello"
