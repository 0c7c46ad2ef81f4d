"""Many associations: at once, and one after the other; and a daemon with other limits than the usual ones."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import sctp_probe
from tests.support.daemon import Proxyd
from tests.support.manifests import service as service_manifest
from tests.support.manifests import write
from tests.support.netlab import Namespace
from tests.support.sctp_probe import Echo, End, Message, Server, Streams
from tests.support.sctplab import PORT, SctpLab, pod_ip, resident_by_round
from tests.support.waiting import wait_for

AT_ONCE = 500
ONE_ROUND = 250
LARGE = 384 * 1024  # more than the default limit, and less than what the kernel lets anybody send at once


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


@pytest.mark.timeout(400)
def test_memory_does_not_grow_with_associations_that_are_over(sctp: SctpLab) -> None:
    sizes = resident_by_round(sctp, ONE_ROUND, 8)
    # What each association leaves behind is left in every round: 32 bytes of each are 8 KiB. An allocator takes more
    # memory now and then, and keeps it.
    grown = [after - before for before, after in itertools.pairwise(sizes[1:])]
    assert statistics.median(grown) < 8, sizes


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
