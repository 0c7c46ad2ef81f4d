"""Many associations: at once, and one after the other; and a daemon with other limits than the usual ones."""

from __future__ import annotations

import contextlib
import selectors
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.support import sctp_probe
from tests.support.clients import wait_for
from tests.support.daemon import Proxyd, resident_kib
from tests.support.manifests import service as service_manifest
from tests.support.manifests import write
from tests.support.netlab import Namespace
from tests.support.sctp_probe import Association, End, Message, Server, Streams
from tests.support.sctplab import PORT, SctpLab, pod_ip

AT_ONCE = 500
ONE_BY_ONE = 1500
LARGE = 384 * 1024  # more than the default limit, and less than what the kernel lets anybody send at once


class Echo:
    """Answers every message of every association with itself, in one thread."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._selector = selectors.DefaultSelector()
        self._selector.register(server.socket, selectors.EVENT_READ, None)
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            for ready, _ in self._selector.select(0.2):
                if ready.data is None:
                    association = self._server.accept()
                    association.socket.setblocking(False)
                    self._selector.register(association.socket, selectors.EVENT_READ, association)
                elif not self._answer(ready.data):
                    self._selector.unregister(ready.data.socket)
                    ready.data.close()

    @staticmethod
    def _answer(association: Association) -> bool:
        """Answer what there is; False where the association has ended."""
        try:
            while isinstance(message := association.receive(), Message):
                association.send(message)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        for ready in list(self._selector.get_map().values()):
            if ready.data is not None:
                ready.data.close()
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def one_after_the_other(sctp: SctpLab, count: int) -> int:
    """That many associations, a message each way on each; by how many KiB the worker grew after the first tenth."""
    worker = sctp.worker()
    with Server(sctp.lab.pods[0], pod_ip(1)) as server, Echo(server):
        service = sctp.service(server)
        warm = 0
        for number in range(count):
            with service.connect() as client:
                message = Message(number.to_bytes(4, "big"), number % 10)
                client.send(message)
                assert client.receive() == message
            if number == count // 10:
                warm = resident_kib(worker)
        service.wait_ended()
        grown = resident_kib(worker) - warm
        service.remove()
    return grown


@pytest.mark.timeout(400)
def test_five_hundred_associations_at_once(sctp: SctpLab) -> None:
    with Server(sctp.lab.pods[0], pod_ip(1)) as server, Echo(server), contextlib.ExitStack() as stack:
        service = sctp.service(server)
        clients = []
        for number in range(AT_ONCE):
            client = stack.enter_context(service.connect(outgoing=2, incoming=2, buffer=1 << 14))
            # Its endpoint has answered before the next one comes: an emulated one may be too slow for all of them at once.
            client.send(Message(b"first"))
            assert client.receive() == Message(b"first"), f"association {number}"
            clients.append(client)
        for number, client in enumerate(clients):
            client.send(Message(number.to_bytes(4, "big"), number % 2))
        for number, client in enumerate(clients):
            assert client.receive() == Message(number.to_bytes(4, "big"), number % 2)
        (listed,) = [one for one in sctp.proxyd.get("services") if one["name"] == service.name]
        assert listed["connections"] == AT_ONCE
        for client in clients:
            client.close()
        service.wait_ended()
        service.remove()


@pytest.mark.timeout(400)
def test_memory_does_not_grow_with_associations_that_are_over(sctp: SctpLab) -> None:
    # Two bytes for each association would be seen here; what is kept once for all is less than a page or two.
    assert one_after_the_other(sctp, ONE_BY_ONE) < 256


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[tuple[Namespace, Path]]:
    """A namespace with nothing but a loopback, and a folder of manifests."""
    folder = tmp_path / "manifests"
    folder.mkdir()
    with Namespace("alone") as namespace:
        yield namespace, folder


@pytest.mark.timeout(400)
def test_all_streams_large_messages_and_a_drain(sctp: SctpLab, alone: tuple[Namespace, Path]) -> None:
    namespace, manifests = alone
    flags = (
        "--feature-gates=SCTPSupport=true",
        "--sctp-max-streams=65535",
        "--sctp-max-message=384Ki",
        "--allow-loopback-endpoints=true",
        "--vip-mode=loopback",
        "--drain-timeout=300s",
    )
    with Server(namespace, "127.0.0.1", outgoing=65_535, incoming=65_535, buffer=1 << 21) as server:
        manifest = service_manifest("sig", "127.96.0.10")
        manifest["spec"]["ports"] = [{"port": PORT, "protocol": "SCTP"}]
        backends = {
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": {"name": "sig"},
            "subsets": [
                {"addresses": [{"ip": "127.0.0.1"}], "ports": [{"port": server.port, "protocol": "SCTP"}]}
            ],
        }
        write(manifests / "sig.yaml", manifest, backends)
        with Proxyd(namespace, manifests.parent, manifests, flags=flags) as proxyd:
            proxyd.wait_listener("127.96.0.10", PORT)
            options = {"outgoing": 65_535, "incoming": 65_535, "buffer": 1 << 21}
            with (
                sctp_probe.connect(namespace, "127.96.0.10", PORT, **options) as client,
                server.accept() as accepted,
            ):
                assert client.streams() == accepted.streams() == Streams(incoming=65_535, outgoing=65_535)
                for sender, receiver in ((client, accepted), (accepted, client)):
                    for stream in (0, 32_768, 65_534):
                        sender.send(Message(b"%d" % stream, stream))
                        assert receiver.receive() == Message(b"%d" % stream, stream)
                    sender.send(Message(bytes(LARGE), 65_534))
                    assert receiver.receive() == Message(bytes(LARGE), 65_534)
                proxyd.process.terminate()

                def refused() -> bool:
                    try:
                        sctp_probe.connect(namespace, "127.96.0.10", PORT).close()
                    except ConnectionRefusedError:
                        return True
                    return False

                wait_for(refused, "no new associations")
                client.send(Message(b"still"))
                assert accepted.receive() == Message(b"still")
                client.shut_down()
                assert accepted.receive() is End.SHUTDOWN
                assert client.receive() is End.SHUTDOWN
            assert proxyd.wait(120) == 0
