"""A distribution of somebody else brings a listener: it relays without a change of proxyd."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import wait_for
from daemon import Proxyd
from manifests import endpoints, service, write
from netlab import Lab
from workerlib import WorkerDriver, listen

from proxyd.relay.messages import ListenerConfig

MODULE = '''"""Greets each client with a line, then relays as proxyd's own listener does."""

from proxyd.relay.listener import TcpListener


class Greeter(TcpListener):
    def _accepted(self, sock, address):
        sock.send(b"greetings from " + self.address.encode() + b"\\n")
        super()._accepted(sock, address)


class Echo:
    """The smallest listener: it answers each client by itself, and relays nothing."""

    def __init__(self, config, fd, balancer, plane):
        import socket

        self.id, self.address, self.balancer, self.plane = config.id, config.address, balancer, plane
        self.closed, self.open_relays = False, 0
        self.socket = socket.socket(fileno=fd)
        plane.poller.add(fd, self.ready, 1)

    def ready(self, events):
        client, _ = self.socket.accept()
        with client:
            client.send(b"echo " + self.balancer.name.encode())

    def close(self):
        self.closed = True
        self.plane.poller.close_shared(self.socket)
        self.plane.reporter.drained(self.id)
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path of every Python started from here, with a distribution installed in it."""
    folder = tmp_path / "site"
    info = folder / "acme_relay-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "acme_relay.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-relay\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[proxyd.listeners]\nTCP = acme_relay:Greeter\n")
    yield folder
