"""SCTP Services: endpoints in turn, dead ones avoided, affinity, NodePorts, externalIPs, IPv6, drain, what operators see."""

from __future__ import annotations

import contextlib
import select
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support import sctp_probe
from tests.support.netlab import EXTERNAL_IP, NODE_IP
from tests.support.sctp_probe import Association, End, Message, Server
from tests.support.sctplab import CLIENT_IP, PORT, SctpLab, Service, pod_ip, pod_ip6
from tests.support.waiting import wait_for

REFUSED = "refused|not available"  # by the kernel, or by the guard of the VIP
DEAD = "10.244.0.200"  # nobody has it: INITs are not answered


@contextlib.contextmanager
def two_servers(sctp: SctpLab) -> Iterator[tuple[Server, Server]]:
    """A server on each pod, on the same port."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Server(sctp.lab.pods[0], pod_ip(1)))
        yield first, stack.enter_context(Server(sctp.lab.pods[1], pod_ip(2), port=first.port))


def who_serves(client: Association, servers: tuple[Server, ...]) -> Server:
    """Which of the servers got this association: each one asks for an answer of its own."""
    ready, _, _ = select.select([server.socket for server in servers], [], [], sctp_probe.TIMEOUT)
    (sock,) = ready
    (server,) = (one for one in servers if one.socket is sock)
    with server.accept() as accepted:
        accepted.send(Message(b"served"))
        assert client.receive() == Message(b"served")
    return server


def served_by(service: Service, *servers: Server, count: int = 6) -> Counter[str]:
    """How many of `count` associations each server got, by address."""
    found: Counter[str] = Counter()
    for _ in range(count):
        with service.connect() as client:
            found[who_serves(client, servers).ip] += 1
    return found


def test_endpoints_take_turns(sctp: SctpLab) -> None:
    with two_servers(sctp) as (first, second):
        service = sctp.service(first, second)
        assert served_by(service, first, second) == {first.ip: 3, second.ip: 3}


def test_same_client_keeps_its_endpoint_with_affinity(sctp: SctpLab) -> None:
    with two_servers(sctp) as (first, second):
        service = sctp.service(first, second, sessionAffinity="ClientIP")
        assert list(served_by(service, first, second).values()) == [6]


@pytest.mark.parametrize("why", ["refuses", "is silent"])
def test_endpoint_that_refuses_or_is_silent_is_not_noticed_by_clients(sctp: SctpLab, why: str) -> None:
    with Server(sctp.lab.pods[0], pod_ip(1)) as alive:
        service = sctp.service(alive, (pod_ip(2) if why == "refuses" else DEAD, alive.port))
        assert served_by(service, alive, count=4) == {alive.ip: 4}


def test_clients_are_aborted_when_every_endpoint_refuses(sctp: SctpLab) -> None:
    service = sctp.service((pod_ip(1), 4001), (pod_ip(2), 4001))
    # The abort may come before connect() returns.
    with contextlib.suppress(ConnectionResetError), service.connect() as client:
        assert client.receive() is End.ABORT
    service.wait_records(1, lambda record: record["reason"] == "no endpoint")
    service.wait_ended()


def test_clients_are_refused_while_there_are_no_endpoints(sctp: SctpLab) -> None:
    service = sctp.service()
    with pytest.raises(OSError, match=REFUSED):
        service.connect()
    with Server(sctp.lab.pods[0], pod_ip(1)) as server:
        service.write(server)
        service.wait("Serving")
        assert served_by(service, server, count=1)
        service.write()
        service.wait("NoEndpoints")
        with pytest.raises(OSError, match=REFUSED):
            service.connect()


def test_node_port_and_external_ip_are_served(sctp: SctpLab) -> None:
    with Server(sctp.lab.pods[0], pod_ip(1)) as server:
        sctp.service(server, nodePort=30_868, externalIPs=[NODE_IP])
        sctp.proxyd.wait_listener(NODE_IP, 30_868)
        sctp.proxyd.wait_listener(NODE_IP, PORT)
        for port in (30_868, PORT):
            with sctp_probe.connect(sctp.lab.outside, NODE_IP, port) as client, server.accept() as accepted:
                client.send(Message(b"%d" % port, 9, b"\1\2\3\4", True))
                assert accepted.receive() == Message(b"%d" % port, 9, b"\1\2\3\4", True)


def test_external_ip_of_somebody_else_fails_alone(sctp: SctpLab) -> None:
    with Server(sctp.lab.pods[0], pod_ip(1)) as server:
        service = sctp.service(server, externalIPs=[EXTERNAL_IP])
        failed = sctp.proxyd.wait_listener(EXTERNAL_IP, PORT, "Failed")
        assert "not an address of this node" in failed.detail
        assert served_by(service, server, count=1)


def test_ipv6_client_reaches_an_ipv6_endpoint(sctp: SctpLab) -> None:
    with Server(sctp.lab.pods[0], pod_ip6(1)) as server:
        service = sctp.service(server, vip="fd00:10:96::1:1", ipFamilies=["IPv6"])
        with service.connect() as client, server.accept() as accepted:
            for sender, receiver in ((client, accepted), (accepted, client)):
                sender.send(Message(bytes(100_000), 3))
                assert receiver.receive() == Message(bytes(100_000), 3)


def test_connections_access_log_and_metrics_tell_of_associations(sctp: SctpLab) -> None:
    with Server(sctp.lab.pods[0], pod_ip(1)) as server:
        service = sctp.service(server)
        with service.connect(outgoing=17, incoming=33) as client, server.accept() as accepted:
            client.send(Message(bytes(1000)), Message(bytes(500), 16))
            accepted.receive_all(2)
            accepted.send(Message(bytes(100)))
            client.receive_all(1)
            host, port = client.socket.getsockname()

            def counted() -> bool:
                (one,) = service.connections()
                return (one["bytesIn"], one["bytesOut"]) == (1500, 100)

            wait_for(counted, "the bytes counted")
            (connection,) = service.connections()
            assert connection["protocol"] == "SCTP"
            assert connection["client"] == f"{CLIENT_IP}:{port}", host
            assert connection["endpoint"] == f"{server.ip}:{server.port}"
            assert connection["state"] == "established"
            listing = sctp.proxyd.cli("get", "connections", "-A", "-o", "wide", timeout=120).stdout
            assert "17/33" in listing
            assert server.ip in listing
            client.shut_down()
            assert accepted.receive() is End.SHUTDOWN
            assert client.receive() is End.SHUTDOWN
        (record,) = service.wait_records(1)
        assert record["frontend"] == f"{service.vip}:{PORT}"
        assert record["reason"] == "closed"
        assert (record["bytesIn"], record["bytesOut"]) == (1500, 100)
