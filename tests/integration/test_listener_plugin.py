"""A distribution of somebody else brings a listener: it serves without a change of proxyd."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from proxyd.relay.ipc.messages import CloseListener, ListConnections, ListenerConfig
from tests.support.clients import connect, read_all
from tests.support.daemon import Proxyd
from tests.support.manifests import endpoints, service, write
from tests.support.netlab import Lab
from tests.support.waiting import DEADLINE, wait_for
from tests.support.worker import WorkerDriver, listen

VIP = "10.96.0.10"
# The smallest listener: it answers each client by itself, with what it was told.
MODULE = """
import socket


class Parrot:
    def __init__(self, config, fd, balancer, plane):
        self.id, self.address, self.balancer, self.plane = config.id, config.address, balancer, plane
        self.closed, self.open_relays = False, 0
        self.socket = socket.socket(fileno=fd)
        plane.poller.add(fd, self.ready, 1)

    def ready(self, events):
        client, _ = self.socket.accept()
        with client:
            client.send(f"{self.balancer.name} at {self.address}".encode())

    def close(self):
        self.closed = True
        self.plane.poller.close_shared(self.socket)
        self.plane.reporter.drained(self.id)
"""

# One with every optional part: its clients are relays, and each is told what the listener or its relay was told.
KEEPER = """
from proxyd.relay.ipc.messages import LiveConnection
from acme_relay import Parrot


class Kept:
    def __init__(self, listener, client):
        self.listener, self.client, self.service = listener, client, listener.balancer.name
        listener.plane.poller.add(client.fileno(), self.ready, 1)
        listener.plane.opened(self)

    def ready(self, events):
        if self.client.recv(100) == b"fail":
            raise ValueError("as it was asked to")

    def dial_due(self, now):
        pass

    def tick(self, now):
        pass

    def live(self, now):
        return LiveConnection("c", self.listener.address, self.service, "e", "GREETING", 1.0, 2, 3, "kept")

    def crash(self):
        self.abort("crashed")

    def abort(self, reason):
        self.say(reason)
        self.listener.plane.poller.close(self.client)
        self.listener.plane.closed(self)
        self.listener.ended(self)

    def say(self, what):
        self.client.send(what.encode() + b".")


class Keeper(Parrot):
    def __init__(self, config, fd, balancer, plane):
        super().__init__(config, fd, balancer, plane)
        self.kept = []

    def ready(self, events):
        self.open_relays += 1
        self.kept.append(Kept(self, self.socket.accept()[0]))
        self.kept[-1].say("hello")

    def ended(self, relay):
        self.kept.remove(relay)
        self.open_relays -= 1
        if self.closed and not self.kept:
            self.plane.reporter.drained(self.id)

    def close(self):
        self.closed = True
        self.plane.poller.close_shared(self.socket)

    def endpoints_changed(self):
        for relay in self.kept:
            relay.say("changed")

    def linger(self, seconds):
        for relay in self.kept:
            relay.say("lingering")
        return True
"""


@pytest.fixture
def installed(tmp_path: Path) -> Callable[[str], Path]:
    """Installs a distribution that takes a protocol over; the folder it is in."""

    def install(point: str) -> Path:
        info = tmp_path / "acme_relay-1.0.dist-info"
        info.mkdir()
        (tmp_path / "acme_relay.py").write_text(MODULE)
        (tmp_path / "acme_keeper.py").write_text(KEEPER)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-relay\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[proxyd.listeners]\n{point}\n")
        return tmp_path

    return install


def answer(lab: Lab, ip: str, port: int) -> bytes:
    with connect(lab.client, ip, port) as sock:
        return read_all(sock)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_protocol_is_taken_over(
    lab: Lab, folder: Path, manifests: Path, installed: Callable[[str], Path], workers: int
) -> None:
    path = installed("TCP = acme_relay:Parrot")
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    with Proxyd(lab.node, folder, manifests, workers=workers, path=(path,)) as daemon:
        daemon.wait_listener(VIP, 80)
        assert answer(lab, VIP, 80) == b"default/web at 10.96.0.10:80"
        said = [json.loads(line) for line in daemon.log().splitlines()]
        assert any("acme_relay:Parrot of acme-relay 1.0" in line["event"] for line in said), said
        assert daemon.stop() == 0


def test_one_that_cannot_be_imported_harms_nobody(
    lab: Lab, folder: Path, manifests: Path, installed: Callable[[str], Path]
) -> None:
    path = installed("TCP = acme_relay:Missing")
    write(manifests / "web.yaml", service("web", VIP), endpoints("web", 1))
    with Proxyd(lab.node, folder, manifests, path=(path,)) as daemon:
        daemon.wait_listener(VIP, 80)
        text = "acme_relay:Missing: AttributeError: module 'acme_relay' has no attribute 'Missing'"
        wait_for(lambda: text in daemon.log(), "a line about it")
        assert daemon.stop() == 0


def test_a_protocol_is_added(installed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed("GREETING = acme_relay:Parrot")))
    with WorkerDriver() as worker, listen() as sock:
        balancer = worker.balancer([1])
        port = sock.getsockname()[1]
        for protocol, implementation in (("GREETING", "acme_relay:Parrot"), ("OTHER", "")):
            config = ListenerConfig(
                worker.id(), balancer, protocol, f"127.0.0.1:{port}", implementation=implementation
            )
            worker.apply(listeners=[config], descriptors=[sock.fileno()])
            if implementation:
                with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
                    assert client.recv(100) == f"prod/web at 127.0.0.1:{port}".encode()
                worker.apply(close=[CloseListener(config.id)])
        worker.wait(lambda: any("OTHER is not relayed here" in text for text in worker.trouble))


def test_the_optional_parts_of_the_interface(
    installed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed("GREETING = acme_keeper:Keeper")))
    with WorkerDriver() as worker, listen() as sock:
        balancer = worker.balancer([1, 2])
        address = f"127.0.0.1:{sock.getsockname()[1]}"

        def opened() -> int:
            config = ListenerConfig(
                worker.id(), balancer, "GREETING", address, implementation="acme_keeper:Keeper"
            )
            worker.apply(listeners=[config], descriptors=[sock.fileno()])
            return config.id

        number = opened()
        with connect_local(sock) as first, connect_local(sock) as second:
            assert (said(first), said(second)) == (b"hello.", b"hello.")
            # Listed, with the others of its Service.
            worker.channel.send(ListConnections(1, 10))
            worker.wait(lambda: len(worker.live) == 2)
            assert {record.state for record in worker.live} == {"kept"}
            # Told of endpoints that are removed.
            worker.balancer([1], number=balancer)
            assert (said(first), said(second)) == (b"changed.", b"changed.")
            # An internal error of one relay ends it alone.
            first.send(b"fail")
            assert said(first) == b"crashed."
            worker.wait(lambda: any("ValueError: as it was asked to" in text for text in worker.trouble))
            worker.trouble.clear()
            # Ended when its listener's time is over.
            worker.apply(close=[CloseListener(number, 0.1)])
            assert said(second) == b"drained."
            worker.wait(lambda: number in worker.drained)
        # The worker's end.
        opened()
        with connect_local(sock) as third:
            assert said(third) == b"hello."
            worker.shutdown(0.2)
            assert said(third) == b"lingering."
            assert said(third) == b"drained."


def test_a_listener_that_can_not_be_closed_keeps_no_worker_alive(
    installed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would spin on its closed channel."""
    folder = installed("GREETING = acme_stuck:Stuck")
    (folder / "acme_stuck.py").write_text(
        "from acme_relay import Parrot\n\n\n"
        "class Stuck(Parrot):\n    def close(self):\n        raise RuntimeError('stuck')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with WorkerDriver() as worker, listen() as sock:
        config = ListenerConfig(
            worker.id(), worker.balancer([1]), "GREETING", "x", implementation="acme_stuck:Stuck"
        )
        worker.apply(listeners=[config], descriptors=[sock.fileno()])
        with connect_local(sock) as client:
            assert client.recv(100) == b"prod/web at x"
        worker.channel.close()
        assert worker.process.wait(DEADLINE) == 1
        assert worker.process.stderr is not None
        assert b"RuntimeError: stuck" in worker.process.stderr.read()


def connect_local(sock: socket.socket) -> socket.socket:
    return socket.create_connection(sock.getsockname(), DEADLINE)


def said(client: socket.socket) -> bytes:
    """The next word."""
    word = b""
    while not word.endswith(b"."):
        part = client.recv(1)
        assert part, word
        word += part
    return word
