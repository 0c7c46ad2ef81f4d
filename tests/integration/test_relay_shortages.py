"""What a worker does when something of its own runs out: local ports, watches, memory for what is under way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxyd.relay.engine import plane as shared
from proxyd.relay.engine.plane import READ_BYTES, TIGHT_READ_BYTES
from proxyd.relay.ipc import slots as s
from proxyd.relay.ipc.channel import Channel
from proxyd.relay.ipc.options import Options
from proxyd.relay.worker import Worker
from tests.support.netlab import Namespace
from tests.support.waiting import DEADLINE, wait_for
from tests.support.worker import WorkerDriver, echo, names, read_all

MIB = 1 << 20
PORTS = 4
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h; socket has it from Python 3.12 on


class InnerWorker(WorkerDriver):
    """A worker in a thread of this process, so that a test can make a call of it fail."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.slots = s.Slots.create()
        self.pid = os.getpid()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(Channel(theirs), started))
        self._thread.start()
        assert started.wait(DEADLINE)
        self._listen_to(Channel(ours))

    def _run(self, channel: Channel, started: threading.Event) -> None:
        loop = asyncio.new_event_loop()
        self.worker = Worker(loop, channel, self.slots, 0, Options(), on_stopped=lambda _code: loop.stop())
        self.worker.start()
        started.set()
        loop.run_forever()
        loop.close()

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        self.channel.close()
        self._thread.join(15)
        assert not self._thread.is_alive()
        for sock in self._sockets:
            sock.close()
        self.slots.close()
        assert not [text for text in self.trouble if "internal error" in text], self.trouble

    @property
    def plane(self) -> shared.Plane:
        return self.worker._plane


@pytest.fixture
def inner() -> Iterator[InnerWorker]:
    with InnerWorker() as one:
        yield one


@contextlib.contextmanager
def failing(worker: InnerWorker, which: Callable[[int], bool]) -> Iterator[None]:
    """While this is on, the n-th watch (from 0) that the worker asks for is refused where `which(n)` says so."""
    poller = worker.plane.poller
    add = poller.add
    count = 0

    def refuse(*args: object) -> None:
        nonlocal count
        count += 1
        if which(count - 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # what max_user_watches gives
        add(*args)  # type: ignore[arg-type]  # as they came

    poller.add = refuse  # type: ignore[method-assign]  # the fault that is injected
    try:
        yield
    finally:
        poller.add = add  # type: ignore[method-assign]  # as above


@pytest.fixture
def node() -> Iterator[Namespace]:
    with Namespace("ports") as one:
        yield one


def leave_few_ports(node: Namespace) -> None:
    """From now on PORTS connections to one address and port can be made in this namespace, from each source address."""
    node.sysctl(net__ipv4__ip_local_port_range=f"20000 {20000 + PORTS - 1}")


def connect_from(node: Namespace, source: str, address: tuple[str, int]) -> socket.socket:
    """Connect from an address of the client's own, so that it is not the clients' ports that run out."""
    sock = node.socket()
    sock.settimeout(DEADLINE)
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((source, 0))
    sock.connect(address)
    return sock


def test_local_ports_run_out_and_come_back(node: Namespace) -> None:
    """Clients wait for a port, a service with another endpoint does not, and nobody is turned away."""

    def until_bye(conn: socket.socket) -> None:
        while (data := conn.recv(100)) and data != b"bye":
            conn.sendall(data)

    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(node.call(WorkerDriver))
        balancer = worker.balancer([node.call(worker.serve, until_bye).port])
        front = node.call(worker.listener, balancer)
        other = node.call(worker.listener, worker.balancer([node.call(worker.serve, echo).port], first=2000))
        leave_few_ports(node)

        def client(number: int, address: tuple[str, int]) -> socket.socket:
            return stack.enter_context(connect_from(node, f"127.0.1.{number}", address))

        served = [client(number, front.address) for number in range(1, PORTS + 1)]
        for sock in served:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        waiting = [client(number, front.address) for number in (11, 12)]
        for sock in waiting:
            sock.sendall(b"y")
        wait_for(lambda: worker.total(1000, s.ATTEMPTS) > PORTS)  # they do not wait for long
        bystander = client(21, other.address)
        bystander.sendall(b"other")
        assert bystander.recv(5) == b"other"
        for sock in served[:2]:  # the endpoint ends first: the port is free at once
            sock.sendall(b"bye")
            assert sock.recv(1) == b""
            sock.close()
        for sock in waiting:
            assert sock.recv(1) == b"y"
        for sock in served[2:]:
            sock.sendall(b"z")
            assert sock.recv(1) == b"z"
        worker.wait(
            lambda: any("no local port left to connect to endpoint" in text for text in worker.trouble)
        )
        assert worker.total(balancer, s.FAILED) == worker.total(1000, s.FAILED) == 0


def test_an_endpoint_to_which_a_port_is_left_is_used(node: Namespace) -> None:
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(node.call(WorkerDriver))
        full, roomy = (node.call(worker.serve, echo) for _ in range(2))
        first = node.call(worker.listener, worker.balancer([full.port]))
        both = node.call(worker.listener, worker.balancer([full.port, roomy.port], first=2000))
        leave_few_ports(node)
        for turn, front in enumerate((first, both)):
            for number in range(1, PORTS + 1):
                sock = stack.enter_context(connect_from(node, f"127.0.{turn + 1}.{number}", front.address))
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
        assert worker.total(2001, s.OPENED) == PORTS


def test_an_endpoint_that_cannot_be_watched_is_dialled_again(inner: InnerWorker) -> None:
    balancer = inner.balancer([inner.serve(names(b"a")).port])
    front = inner.listener(balancer)
    with failing(inner, lambda number: number == 0):  # the first watch of a relay is its endpoint's
        assert front.ask() == b"a"
    inner.wait(lambda: any("No space left on device: accepting paused" in text for text in inner.trouble))
    assert inner.total(balancer, s.FAILED) == inner.total(1000, s.FAILED) == 0
    assert front.ask() == b"a"


def test_a_client_that_cannot_be_watched_is_reset(inner: InnerWorker) -> None:
    balancer = inner.balancer([inner.serve(names(b"a")).port])
    front = inner.listener(balancer)
    assert front.ask() == b"a"
    wait_for(lambda: inner.total(balancer, s.CLOSED) == 1)
    with failing(inner, lambda number: number == 1), pytest.raises(ConnectionResetError):
        front.read()
    wait_for(lambda: inner.total(balancer, s.FAILED) == 1)
    assert front.ask() == b"a"
    wait_for(lambda: inner.total(balancer, s.CLOSED) == 3)
    inner.wait(lambda: not inner.plane.relays and not inner.plane.dialling)


def test_reads_are_small_while_much_is_kept_and_everything_arrives(
    inner: InnerWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "PENDING_LIMIT", MIB // 2)
    block = os.urandom(MIB)

    def push(conn: socket.socket) -> None:
        for _ in range(6):
            conn.sendall(block)

    front = inner.forward(inner.serve(push).port)
    other = inner.forward(inner.serve(echo).port)
    clients = []
    for _ in range(40):
        client = socket.socket()
        client.settimeout(DEADLINE)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(front.address)
        clients.append(client)
    wait_for(lambda: len(inner.plane.view) == TIGHT_READ_BYTES)
    with other.connect() as sock:
        sender = threading.Thread(target=lambda: (sock.sendall(block), sock.shutdown(socket.SHUT_WR)))
        sender.start()
        assert read_all(sock) == block
        sender.join()
    for client in clients:
        with client:
            assert read_all(client) == block * 6
    wait_for(lambda: len(inner.plane.view) == READ_BYTES)


def test_no_descriptor_is_left_of_what_failed(inner: InnerWorker) -> None:
    front = inner.listener(inner.balancer([inner.serve(names(b"a")).port]))
    assert front.ask() == b"a"

    def open_now() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    wait_for(lambda: not inner.plane.relays)
    before = open_now()
    with failing(inner, lambda number: number % 3 == 1):
        for _ in range(20):
            with contextlib.suppress(ConnectionResetError):
                front.ask()
    wait_for(lambda: not inner.plane.relays)
    wait_for(lambda: open_now() <= before)
