"""Several addresses at either end: peers learn of them, and a path that fails loses no message."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.netlab import NODE_IP, NODE_IP6, OUTSIDE_IP, OUTSIDE_IP6
from tests.support.sctp_probe import Association, End, Message, Server
from tests.support.sctplab import CLIENT_IP, CLIENT_IP_2, NODE_IP_2, PORT, SctpLab, pod_ip, second_ip
from tests.support.waiting import wait_for

COUNT = 600
# Lost paths are noticed soon, and heartbeats come often: milliseconds, and failures until another path is taken. Too often
# for many associations.
TIMERS = {
    "rto_min": "100",
    "rto_initial": "300",
    "rto_max": "1000",
    "hb_interval": "500",
    "path_max_retrans": "1",
    "association_max_retrans": "50",
}


@pytest.fixture(autouse=True)
def _timers(sctp: SctpLab) -> Iterator[None]:
    """For every socket that is made meanwhile; an association has those of its socket."""
    hosts = (sctp.lab.node, sctp.lab.client, sctp.lab.outside, *sctp.lab.pods)
    usual = {f"net__sctp__{name}": Path("/proc/sys/net/sctp", name).read_text() for name in TIMERS}
    for host in hosts:
        host.sysctl(**{f"net__sctp__{name}": value for name, value in TIMERS.items()})
    yield
    for host in hosts:
        host.sysctl(**usual)


@pytest.fixture
def cut(sctp: SctpLab) -> Iterator[Callable[[str], None]]:
    """Takes a path out of service: `cbr0` or `cbr1` of the node. Everything is whole again after the test."""

    def down(bridge: str) -> None:
        sctp.lab.node.ip(f"link set {bridge} down")

    yield down
    # The first one takes its routes with it.
    for bridge in ("cbr0", "cbr1"):
        sctp.lab.node.ip(f"link set {bridge} up")
    sctp.lab.node.ip("addr replace fd00:10:244::1/64 dev cbr0 nodad")


def talk(client: Association, server: Association, midway: Callable[[], None]) -> None:
    """Send COUNT messages each way at once, `midway` called after a third; nothing may be missing."""
    sent = [Message(number.to_bytes(4, "big") * 100, number % 10) for number in range(COUNT)]
    arrived: dict[Association, list[Message]] = {}
    third = threading.Event()

    def send(sender: Association) -> None:
        for number, message in enumerate(sent):
            if number == COUNT // 3:
                third.wait()
            sender.send(message)

    def receive(receiver: Association) -> None:
        arrived[receiver] = receiver.receive_all(COUNT)

    threads = [
        threading.Thread(target=job, args=(end,)) for end in (client, server) for job in (send, receive)
    ]
    for thread in threads:
        thread.start()
    midway()
    third.set()
    for thread in threads:
        thread.join()
    for received in arrived.values():
        for stream in range(10):
            of_stream = [message for message in received if message.stream == stream]
            assert of_stream == sent[stream::10], f"stream {stream}"
    assert len(arrived) == 2


@pytest.mark.parametrize("first", ["cbr0", "cbr1"])
def test_client_with_two_paths_to_a_service_loses_nothing_when_one_is_cut(
    sctp: SctpLab, cut: Callable[[str], None], first: str
) -> None:
    # The server is the node's neighbour on a link of its own: only the client's paths are cut.
    with Server(sctp.lab.outside, OUTSIDE_IP) as server:
        service = sctp.service(server, annotations={"proxyd.io/sctp-addresses": NODE_IP_2})
        sctp.proxyd.wait_listener(NODE_IP_2, PORT, service=f"default/{service.name}")
        to = service.vip if first == "cbr0" else NODE_IP_2
        with service.connect(ip=to, source=[CLIENT_IP, CLIENT_IP_2]) as client, server.accept() as accepted:
            assert client.peers() == {service.vip, NODE_IP_2}
            talk(client, accepted, lambda: cut(first))
            client.shut_down()
            assert accepted.receive() is End.SHUTDOWN
            assert client.receive() is End.SHUTDOWN


@pytest.mark.parametrize("first", ["cbr0", "cbr1"])
def test_endpoint_with_two_paths_loses_nothing_when_one_is_cut(
    sctp: SctpLab, cut: Callable[[str], None], first: str
) -> None:
    ips = (pod_ip(1), second_ip(1)) if first == "cbr0" else (second_ip(1), pod_ip(1))
    with Server(sctp.lab.pods[0], *ips) as server:
        further = {"proxyd.io/sctp-endpoint-addresses": f"{ips[0]}={ips[1]}"}
        service = sctp.service(server, further=further)
        with service.connect(sctp.lab.outside) as client, server.accept() as accepted:
            talk(client, accepted, lambda: cut(first))


def test_endpoint_whose_first_address_is_dead_is_reached_by_its_second(
    sctp: SctpLab, cut: Callable[[str], None]
) -> None:
    with Server(sctp.lab.pods[0], pod_ip(1), second_ip(1)) as server:
        service = sctp.service(
            server, further={"proxyd.io/sctp-endpoint-addresses": f"{pod_ip(1)}={second_ip(1)}"}
        )
        cut("cbr0")
        with service.connect(sctp.lab.outside) as client:
            client.send(Message(b"by the second"))
            with server.accept() as accepted:
                assert accepted.receive() == Message(b"by the second")


def test_address_that_is_added_or_taken_away_leaves_associations_alone(sctp: SctpLab) -> None:
    with Server(sctp.lab.pods[0], pod_ip(1)) as server:
        service = sctp.service(server)
        name = f"default/{service.name}"
        with service.connect() as client, server.accept() as accepted:
            assert client.peers() == {service.vip}
            service.write(server, annotations={"proxyd.io/sctp-addresses": NODE_IP_2})
            sctp.proxyd.wait_listener(NODE_IP_2, PORT, service=name)
            with service.connect(ip=NODE_IP_2) as second, server.accept():
                assert second.peers() == {service.vip, NODE_IP_2}
            service.write(server)
            wait_for(lambda: sctp.proxyd.find(NODE_IP_2, PORT, name) is None, "the second address given up")
            with pytest.raises(ConnectionRefusedError):
                service.connect(ip=NODE_IP_2)
            client.send(Message(b"still"))
            assert accepted.receive() == Message(b"still")


def test_ipv4_and_ipv6_are_addresses_of_one_endpoint(sctp: SctpLab) -> None:
    with Server(sctp.lab.pods[0], pod_ip(1)) as server:
        annotations = {"proxyd.io/sctp-addresses": NODE_IP6}
        service = sctp.service(server, externalIPs=[NODE_IP], annotations=annotations)
        for ip in (NODE_IP, NODE_IP6):
            sctp.proxyd.wait_listener(ip, PORT, service=f"default/{service.name}")
        source = [OUTSIDE_IP6, OUTSIDE_IP]
        with (
            service.connect(sctp.lab.outside, NODE_IP6, source=source) as client,
            server.accept() as accepted,
        ):
            # The clusterIP is private: the kernel does not tell it to peers with public addresses (RFC 4960 has scopes).
            assert client.peers() == {NODE_IP, NODE_IP6}
            client.send(Message(b"six"))
            assert accepted.receive() == Message(b"six")
