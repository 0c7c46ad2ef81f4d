"""A distribution of somebody else brings a listener: it serves without a change of proxyd."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from proxyd.relay.ipc.messages import CloseListener, ListenerConfig
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


@pytest.fixture
def installed(tmp_path: Path) -> Callable[[str], Path]:
    """Installs a distribution that takes a protocol over; the folder it is in."""

    def install(point: str) -> Path:
        info = tmp_path / "acme_relay-1.0.dist-info"
        info.mkdir()
        (tmp_path / "acme_relay.py").write_text(MODULE)
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
