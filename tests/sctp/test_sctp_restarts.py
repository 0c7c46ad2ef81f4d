"""Listening sockets outlive workers and programs: with all their addresses, and without a client that is refused."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Self

import pytest

from tests.support.daemon import Proxyd
from tests.support.sctp_probe import Association, Echo, End, Message, Server
from tests.support.sctplab import CLIENT_IP, CLIENT_IP_2, NODE_IP_2, PORT, SctpLab, Service, pod_ip
from tests.support.waiting import wait_for

ADDRESSES = {"proxyd.io/sctp-addresses": NODE_IP_2}
PATHS = [CLIENT_IP, CLIENT_IP_2]


def echoes(client: Association, text: bytes) -> bool:
    client.send(Message(text))
    return client.receive() == Message(text)


@contextlib.contextmanager
def multi_homed(sctp: SctpLab) -> Iterator[tuple[Service, Server]]:
    """A Service with two addresses, whose endpoint answers with what it is told."""
    with Server(sctp.lab.pods[0], pod_ip(1)) as server, Echo(server):
        service = sctp.service(server, annotations=ADDRESSES)
        sctp.proxyd.wait_listener(NODE_IP_2, PORT, service=f"default/{service.name}")
        yield service, server


def upgrade(daemon: Proxyd) -> None:
    """Have the next program take over, however long that takes: the command waits as long as a real machine may need."""
    before = daemon.status()["started"]

    def serves() -> bool:
        status = daemon._ask("status")
        return status is not None and status["started"] != before and status["phase"] == "serving"

    daemon.signal(signal.SIGUSR2)
    wait_for(serves, "the next program")
    daemon.wait_answers()


class Knocking:
    """Clients that come one after the other, to one address and the other; `failures` says how they fared."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stop = False
        self._served = 0
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        for ip in itertools.cycle([self._service.vip, NODE_IP_2]):
            if self._stop:
                return
            try:
                with self._service.connect(ip=ip) as client:
                    if not echoes(client, ip.encode()):
                        self.failures.append(f"{ip}: not served")
            except OSError as error:
                self.failures.append(f"{ip}: {error!r}")
            self._served += 1

    def wait_more(self) -> None:
        """Wait until each of both addresses has been tried once more, from here on."""
        begun = self._served
        wait_for(lambda: self._served >= begun + 3, "more clients")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()


@pytest.mark.timeout(400)
def test_upgrade_keeps_every_address_and_every_association(sctp: SctpLab) -> None:
    with multi_homed(sctp) as (service, server):
        before = sctp.worker()
        with service.connect(source=PATHS) as kept:
            assert echoes(kept, b"before")
            with Knocking(service) as knocking:
                knocking.wait_more()
                upgrade(sctp.proxyd)
                knocking.wait_more()
            assert knocking.failures == []
            assert echoes(kept, b"after")
            (shown,) = service.connections()
            assert shown["client"].endswith(f":{kept.socket.getsockname()[1]}")
            for ip in (service.vip, NODE_IP_2):
                with service.connect(ip=ip, source=PATHS) as client:
                    assert echoes(client, b"new")
                    assert client.peers() == {service.vip, NODE_IP_2}
            # The next program knows that the socket has two addresses, and gives one up when it is told to.
            service.write(server)
            wait_for(lambda: [one["address"] for one in service.listeners()] == [service.vip], "one address")
            with pytest.raises(ConnectionRefusedError):
                service.connect(ip=NODE_IP_2)
            with service.connect(source=PATHS) as client:
                assert client.peers() == {service.vip}
            assert echoes(kept, b"still")
        wait_for(lambda: not os.path.exists(f"/proc/{before}"), "the end of the worker of before")  # noqa: PTH110 a process


def test_who_comes_while_there_is_no_worker_waits_for_the_next(sctp: SctpLab) -> None:
    with multi_homed(sctp) as (service, _):
        worker = sctp.worker()
        with service.connect() as lost:
            assert echoes(lost, b"before")
            # It is stopped first: so whoever comes now is not its client in any case.
            os.kill(worker, signal.SIGSTOP)
            with service.connect() as first, service.connect(ip=NODE_IP_2) as second:
                first.send(Message(b"first"))
                second.send(Message(b"second"))
                os.kill(worker, signal.SIGKILL)
                assert first.receive() == Message(b"first")
                assert second.receive() == Message(b"second")
            assert isinstance(lost.receive(), End)
        assert sctp.worker() != worker
