"""What Kubernetes promises of Services, followed through an API server on two nodes.

The list is that of the upstream end-to-end tests of the network. All tests share one lab, one API server and two running
proxyds; each has Services of its own and removes them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import signal
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import Load, ask, connect, many, read_all, refused
from tests.support.clusterlab import (
    API_PORT,
    NODE_1,
    NODE_2,
    Body,
    Cluster,
    pod,
    service,
    slice_of,
    wait_who,
    who,
)
from tests.support.daemon import Proxyd
from tests.support.netlab import (
    BRIDGE_IP,
    CLIENT_POD_IP,
    NODE_IP,
    NODE_IP6,
    OUTSIDE_IP,
    POD_PORT,
    Lab,
    Namespace,
    pod_ip6,
)
from tests.support.pod_servers import PodServers
from tests.support.waiting import wait_for

P1, P2, P3 = "pod-1", "pod-2", "pod-3"
NOBODY = {""}
_numbers = itertools.count(10)


class Town:
    """The lab, the API server and proxyd on both nodes; `one` and `two` are the nodes' namespaces."""

    def __init__(self, lab: Lab, cluster: Cluster, daemons: dict[str, Proxyd]) -> None:
        self.lab = lab
        self.cluster = cluster
        self.daemons = daemons
        self.one, self.two = lab.node, lab.outside
        self.client, self.pods = lab.client, lab.pods

    def fetch(self, place: Namespace, url: str) -> tuple[int, dict[str, str], str]:
        """Status, headers and body of a GET."""

        def get() -> tuple[int, dict[str, str], str]:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            try:
                with opener.open(url, timeout=5) as answer:
                    return answer.status, dict(answer.headers), answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, dict(error.headers), error.read().decode()

        return place.call(get)


@pytest.fixture(scope="module")
def made() -> Iterator[Town]:
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(3, ipv6=True))
        folder = Path(tempfile.mkdtemp(prefix="proxyd-"))
        stack.callback(shutil.rmtree, folder)
        cluster = stack.enter_context(Cluster(lab, folder))
        cluster.add_nodes()
        daemons = {node: stack.enter_context(cluster.proxyd(node)) for node in (NODE_1, NODE_2)}
        yield Town(lab, cluster, daemons)


@pytest.fixture
def town(made: Town) -> Iterator[Town]:
    """The town, without Services of an earlier test."""
    yield made
    for kind in ("services", "endpointslices"):
        for item in made.cluster.request("GET", made.cluster._path(kind))["items"]:
            made.cluster.delete(kind, item["metadata"]["name"])
    for daemon in made.daemons.values():
        assert daemon.process.poll() is None
        wait_for(lambda daemon=daemon: not daemon.get("services"), "all Services to be gone")  # type: ignore[misc]  # a bound default has no type


@pytest.fixture
def vip() -> str:
    """A clusterIP that no other test uses."""
    return f"10.96.7.{next(_numbers)}"


class UdpPods:
    """Each pod answers datagrams with its name, at the pods' port."""

    def __init__(self, pods: list[Namespace]) -> None:
        self._sockets = []
        self._threads = []
        for each in pods:
            sock = each.socket(kind=socket.SOCK_DGRAM)
            sock.bind(("0.0.0.0", POD_PORT))
            self._sockets.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock, each.name.encode()))
            thread.start()
            self._threads.append(thread)

    @staticmethod
    def _serve(sock: socket.socket, name: bytes) -> None:
        while True:
            data, peer = sock.recvfrom(1 << 16)
            if data == b"end":
                return
            sock.sendto(name, peer)

    def close(self) -> None:
        for sock, thread in zip(self._sockets, self._threads, strict=True):
            with socket.socket(type=socket.SOCK_DGRAM), contextlib.suppress(OSError):
                sock.sendto(b"end", sock.getsockname())
            thread.join(5)
            sock.close()


def ask_udp(sock: socket.socket, ip: str, port: int, timeout: float = 1) -> str:
    """The pod that answers a datagram; "" for a refusal."""
    sock.settimeout(timeout)
    sock.sendto(b"who", (ip, port))
    try:
        return sock.recvfrom(100)[0].decode()
    except (TimeoutError, ConnectionRefusedError):
        return ""


# Endpoints


def test_endpoints_come_and_go(town: Town, vip: str) -> None:
    cluster = town.cluster
    cluster.serve("web", vip, pod(1))
    wait_who(town.client, vip, {P1})
    cluster.endpoints("web", pod(1), pod(2), pod(3, node=NODE_2))
    wait_who(town.client, vip, {P1, P2, P3})
    wait_who(town.two, vip, {P1, P2, P3})  # the other node's clients as well
    cluster.endpoints("web", pod(3, node=NODE_2))
    wait_who(town.client, vip, {P3})
    cluster.endpoints("web")
    wait_who(town.client, vip, NOBODY)
    cluster.endpoints("web", pod(2))
    wait_who(town.client, vip, {P2})
    cluster.delete("services", "web")
    wait_for(lambda: P2 not in who_or_nobody(town.client, vip), "the Service to be gone")


def who_or_nobody(place: Namespace, ip: str, port: int = 80) -> set[str]:
    try:
        return who(place, ip, port, 1)
    except OSError:
        return set()


def test_a_pod_reaches_itself_through_its_service(town: Town, vip: str) -> None:
    town.cluster.serve("web", vip, pod(1))
    wait_who(town.pods[0], vip, {P1})


def test_slices_are_merged_and_an_endpoint_counts_once(town: Town, vip: str) -> None:
    cluster = town.cluster
    cluster.serve("web", vip, pod(1), pod(2))
    cluster.create("endpointslices", slice_of("web", pod(2), pod(3), number=2))
    wait_who(town.client, vip, {P1, P2, P3})
    assert many(town.client, vip, 80, 30).answered == {P1: 10, P2: 10, P3: 10}
    cluster.delete("endpointslices", "web-1")
    wait_who(town.client, vip, {P2, P3})


def test_named_ports_have_numbers_of_their_own_in_each_slice(town: Town, vip: str) -> None:
    cluster = town.cluster
    ports = [
        {"name": "http", "port": 80, "targetPort": "web"},
        {"name": "alt", "port": 81, "targetPort": "alt"},
    ]
    cluster.create("services", service("web", vip, ports=ports))
    # Nobody listens on port 1: where the number of the other slice was taken, it would show.
    cluster.create("endpointslices", slice_of("web", pod(1), ports=[{"name": "http", "port": POD_PORT}]))
    numbers = [{"name": "http", "port": 1}, {"name": "alt", "port": POD_PORT}]
    cluster.create("endpointslices", slice_of("web", pod(2), number=2, ports=numbers))
    wait_who(town.client, vip, {P2}, 81)
    wait_who(town.client, vip, {P1})


def test_ports_are_added_and_removed(town: Town, vip: str) -> None:
    cluster = town.cluster
    cluster.serve("web", vip, pod(1))
    wait_who(town.client, vip, {P1})
    two = [{"name": "http", "port": 80}, {"name": "more", "port": 8443}]
    cluster.patch("services", "web", {"spec": {"ports": two}})
    numbers = [{"name": "http", "port": POD_PORT}, {"name": "more", "port": POD_PORT}]
    cluster.endpoints("web", pod(1), ports=numbers)
    wait_who(town.client, vip, {P1}, 8443)
    wait_who(town.client, vip, {P1})
    cluster.patch("services", "web", {"spec": {"ports": two[1:]}})
    wait_who(town.client, vip, NOBODY)
    wait_who(town.client, vip, {P1}, 8443)


def test_a_cluster_ip_is_used_again_by_another_service(town: Town, vip: str) -> None:
    cluster = town.cluster
    cluster.serve("old", vip, pod(1))
    wait_who(town.client, vip, {P1})
    cluster.delete("services", "old")
    cluster.delete("endpointslices", "old-1")
    cluster.serve("new", vip, pod(2))
    wait_who(town.client, vip, {P2})


def test_types_change(town: Town, vip: str) -> None:
    cluster = town.cluster
    external = {
        "metadata": {"name": "web"},
        "spec": {"type": "ExternalName", "externalName": "db.example.com"},
    }
    cluster.create("services", external)
    cluster.create("endpointslices", slice_of("web", pod(1)))
    for node, daemon in town.daemons.items():
        wait_for(lambda daemon=daemon: daemon.get("services"), f"it to be shown on {node}")  # type: ignore[misc]  # a bound default has no type
    cluster.replace("services", "web", service("web", vip))
    wait_who(town.client, vip, {P1})
    ports = [{"name": "http", "port": 80, "nodePort": 30101}]
    cluster.replace("services", "web", service("web", vip, ports=ports, type="NodePort"))
    wait_who(town.client, NODE_IP, {P1}, 30101)
    wait_who(town.client, OUTSIDE_IP, {P1}, 30101)
    balanced = service("web", vip, ports=ports, type="LoadBalancer", ingress=[{"ip": "203.0.113.77"}])
    cluster.replace("services", "web", balanced)
    wait_who(town.client, "203.0.113.77", {P1})
    wait_who(town.client, NODE_IP, {P1}, 30101)
    cluster.replace("services", "web", service("web", vip))
    wait_for(lambda: refused(town.client, NODE_IP, 30101), "the NodePort to close")
    wait_who(town.client, vip, {P1})
    cluster.replace("services", "web", external)
    wait_for(lambda: who_or_nobody(town.client, vip) <= NOBODY, "the clusterIP to be gone")


# Addresses


def test_node_ports_by_every_address(town: Town, vip: str) -> None:
    ports = [{"name": "http", "port": 80, "nodePort": 30102}]
    town.cluster.serve("web", vip, pod(1), pod(2), ports=ports, type="NodePort")
    for place, ip in (
        (town.client, NODE_IP),
        (town.client, BRIDGE_IP),
        (town.two, NODE_IP),
        (town.one, NODE_IP),
        (town.one, "127.0.0.1"),
        (town.two, "127.0.0.1"),
        (town.one, OUTSIDE_IP),
    ):
        wait_who(place, ip, {P1, P2}, 30102)
    wait_who(town.client, vip, {P1, P2})


def test_node_ports_by_the_nodes_name(town: Town, vip: str) -> None:
    """The name is found through a Service as well: the cluster's DNS."""
    cluster = town.cluster
    dns, dns_port = f"10.96.7.{next(_numbers)}", 5353
    resolver = town.pods[0].popen(
        [
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"),
            *("--user=root", "--pid-file=", f"--port={dns_port}", f"--host-record={NODE_1}.test,{NODE_IP}"),
        ]
    )
    try:
        udp = [{"name": "dns", "port": 53, "protocol": "UDP"}]
        cluster.create("services", service("dns", dns, ports=udp))
        backend = [{"name": "dns", "port": dns_port, "protocol": "UDP"}]
        cluster.create("endpointslices", slice_of("dns", pod(1), ports=backend))
        ports = [{"name": "http", "port": 80, "nodePort": 30108}]
        cluster.serve("web", vip, pod(1), pod(2), ports=ports, type="NodePort")
        question = ("dig", "+short", "+tries=5", "+time=2", f"@{dns}", f"{NODE_1}.test")
        wait_who(town.client, NODE_IP, {P1, P2}, 30108)
        assert wait_for(lambda: town.client.run(*question).strip(), "the node's address") == NODE_IP
    finally:
        resolver.kill()
        resolver.wait()


def test_a_node_port_goes_from_tcp_to_udp(town: Town, vip: str) -> None:
    cluster = town.cluster
    tcp = [{"name": "http", "port": 80, "nodePort": 30103}]
    cluster.serve("web", vip, pod(1), ports=tcp, type="NodePort")
    wait_who(town.client, NODE_IP, {P1}, 30103)
    servers = UdpPods(town.pods)
    try:
        udp = [{"name": "http", "port": 80, "nodePort": 30103, "protocol": "UDP"}]
        cluster.patch("services", "web", {"spec": {"ports": udp}})
        cluster.endpoints("web", pod(1), ports=[{"name": "http", "port": POD_PORT, "protocol": "UDP"}])
        with town.client.socket(kind=socket.SOCK_DGRAM) as sock:
            wait_for(lambda: ask_udp(sock, NODE_IP, 30103) == P1, "an answer by UDP")
        wait_for(lambda: refused(town.client, NODE_IP, 30103), "the TCP port to close")
    finally:
        servers.close()


def test_one_port_for_tcp_and_udp_and_one_of_them_goes(town: Town, vip: str) -> None:
    cluster = town.cluster
    ports = [{"name": "t", "port": 53}, {"name": "u", "port": 53, "protocol": "UDP"}]
    numbers = [{"name": "t", "port": POD_PORT}, {"name": "u", "port": POD_PORT, "protocol": "UDP"}]
    servers = UdpPods(town.pods)
    try:
        cluster.create("services", service("dns", vip, ports=ports))
        cluster.create("endpointslices", slice_of("dns", pod(1), ports=numbers))
        with town.client.socket(kind=socket.SOCK_DGRAM) as sock:
            wait_for(lambda: ask_udp(sock, vip, 53) == P1, "an answer by UDP")
            wait_who(town.client, vip, {P1}, 53)
            cluster.patch("services", "dns", {"spec": {"ports": ports[1:]}})
            wait_for(lambda: refused(town.client, vip, 53), "TCP to close")
            assert ask_udp(sock, vip, 53, timeout=20) == P1
    finally:
        servers.close()


def test_one_source_port_moves_when_its_pod_is_replaced(town: Town, vip: str) -> None:
    cluster = town.cluster
    ports = [{"name": "u", "port": 53, "protocol": "UDP"}]
    numbers = [{"name": "u", "port": POD_PORT, "protocol": "UDP"}]
    servers = UdpPods(town.pods)
    try:
        cluster.create("services", service("dns", vip, ports=ports))
        cluster.create("endpointslices", slice_of("dns", pod(1), ports=numbers))
        with town.client.socket(kind=socket.SOCK_DGRAM) as sock:
            wait_for(lambda: ask_udp(sock, vip, 53) == P1, "an answer")
            for number in (2, 3, 1):
                cluster.endpoints("dns", pod(number), ports=numbers)
                wait_for(lambda: ask_udp(sock, vip, 53) == f"pod-{number}", f"an answer of pod-{number}")  # noqa: B023  it is called within this turn
    finally:
        servers.close()


def test_load_balancer_addresses(town: Town, vip: str) -> None:
    ingress = [
        {"ip": "203.0.113.81"},
        {"ip": "203.0.113.82", "ipMode": "VIP"},
        {"ip": "203.0.113.83", "ipMode": "Proxy"},
        {"hostname": "lb.example.com"},
    ]
    town.cluster.serve("web", vip, pod(1), type="LoadBalancer", ingress=ingress)
    for ip in ("203.0.113.81", "203.0.113.82"):
        wait_who(town.client, ip, {P1})
    ips = {each["address"] for each in town.daemons[NODE_1].get("listeners")}
    assert "203.0.113.83" not in ips


def test_source_ranges(town: Town, vip: str) -> None:
    ranges = [" 203.0.113.0/24 ", "2001:db8:2::/64"]
    town.cluster.serve(
        "web",
        vip,
        pod(1),
        type="LoadBalancer",
        ingress=[{"ip": "192.0.2.50"}],
        loadBalancerSourceRanges=ranges,
    )
    wait_who(town.client, vip, {P1})  # the clusterIP is for everybody
    wait_for(lambda: not_answered(town.client, "192.0.2.50"), "a client outside the ranges to be turned away")
    town.cluster.patch("services", "web", {"spec": {"loadBalancerSourceRanges": [f"{CLIENT_POD_IP}/32"]}})
    wait_who(town.client, "192.0.2.50", {P1})


def not_answered(place: Namespace, ip: str) -> bool:
    try:
        return not ask(place, ip, 80, timeout=1)
    except OSError:
        return True


def test_dual_stack(town: Town, vip: str) -> None:
    vip6 = f"fd96::{next(_numbers)}"
    body = service("web", vip)
    body["spec"] |= {
        "clusterIPs": [vip, vip6],
        "ipFamilies": ["IPv4", "IPv6"],
        "ipFamilyPolicy": "RequireDualStack",
    }
    town.cluster.create("services", body)
    town.cluster.create("endpointslices", slice_of("web", pod(1)))
    town.cluster.create("endpointslices", slice_of("web", pod(2, ip=pod_ip6(2)), number=2, family="IPv6"))
    wait_who(town.client, vip, {P1})
    wait_who(town.client, vip6, {P2})
    wait_who(town.one, vip6, {P2})


def test_source_ranges_of_each_family(town: Town, vip: str) -> None:
    vip6, balancer, balancer6 = f"fd96::{next(_numbers)}", "192.0.2.51", "2001:db8:9::51"
    ranges = ["203.0.113.0/24", " fd00:10:244::/64 "]
    body = service("web", vip, type="LoadBalancer", ingress=[{"ip": balancer}, {"ip": balancer6}])
    body["spec"] |= {"clusterIPs": [vip, vip6], "loadBalancerSourceRanges": ranges}
    town.cluster.create("services", body)
    town.cluster.create("endpointslices", slice_of("web", pod(1)))
    town.cluster.create("endpointslices", slice_of("web", pod(2, ip=pod_ip6(2)), number=2, family="IPv6"))
    wait_who(town.client, balancer6, {P2})
    wait_for(lambda: not_answered(town.client, balancer), "a client outside the IPv4 range to be turned away")
    town.cluster.patch(
        "services", "web", {"spec": {"loadBalancerSourceRanges": [f"{CLIENT_POD_IP}/32", "2001:db8:2::/64"]}}
    )
    wait_who(town.client, balancer, {P1})
    wait_for(
        lambda: not_answered(town.client, balancer6), "a client outside the IPv6 range to be turned away"
    )


def test_addresses_of_another_family_are_left_alone(town: Town, vip: str) -> None:
    other = "2001:db8:9::52"
    town.cluster.serve("web", vip, pod(1), externalIPs=[other])
    town.cluster.create("endpointslices", slice_of("web", pod(2, ip=pod_ip6(2)), number=2, family="IPv6"))
    wait_who(town.client, vip, {P1})
    found = [one for one in town.daemons[NODE_1].get("listeners") if one["address"] == other]
    assert [(one["state"], "no IPv6 clusterIP" in one["detail"]) for one in found] == [("Disabled", True)]
    assert other not in town.one.run("ip", "-6", "rule")


# Affinity


def test_affinity_on_off_and_timing_out(town: Town, vip: str) -> None:
    cluster = town.cluster
    config = {"clientIP": {"timeoutSeconds": 1}}
    cluster.serve("web", vip, pod(1), pod(2), pod(3))
    wait_who(town.client, vip, {P1, P2, P3})
    cluster.patch("services", "web", {"spec": {"sessionAffinity": "ClientIP"}})
    wait_for(lambda: len(who(town.client, vip)) == 1, "affinity")
    (kept,) = who(town.client, vip)
    # When its endpoint goes, the client gets another one and keeps that.
    rest = [pod(number) for number in (1, 2, 3) if f"pod-{number}" != kept]
    cluster.endpoints("web", *rest)
    wait_for(lambda: kept not in who(town.client, vip, count=1), "another endpoint")
    wait_for(lambda: len(who(town.client, vip)) == 1, "affinity to the other")
    cluster.endpoints("web", pod(1), pod(2), pod(3))
    cluster.patch("services", "web", {"spec": {"sessionAffinityConfig": config}})
    # A changed time-out holds for clients that are known already: after a second of silence one may go elsewhere.
    seen: set[str] = set()

    def moved() -> bool:
        threading.Event().wait(1.1)  # the silence itself
        seen.update(who(town.client, vip, count=1))
        return len(seen) > 1

    wait_for(moved, "the affinity to time out")
    cluster.patch("services", "web", {"spec": {"sessionAffinity": "None", "sessionAffinityConfig": None}})
    wait_who(town.client, vip, {P1, P2, P3})


# Locality


def test_internal_traffic_policy_local(town: Town, vip: str) -> None:
    cluster = town.cluster
    cluster.serve("web", vip, pod(1), pod(2, node=NODE_2), internalTrafficPolicy="Local")
    wait_who(town.one, vip, {P1})
    wait_who(town.two, vip, {P2})
    cluster.endpoints("web", pod(1))
    wait_who(town.two, vip, NOBODY)
    wait_who(town.one, vip, {P1})


def test_external_traffic_policy_local(town: Town, vip: str) -> None:
    cluster = town.cluster
    ports = [{"name": "http", "port": 80, "nodePort": 30104}]
    cluster.serve(
        "web",
        vip,
        pod(1),
        pod(2, node=NODE_2),
        ports=ports,
        type="NodePort",
        externalTrafficPolicy="Local",
    )
    wait_who(town.client, NODE_IP, {P1}, 30104)
    wait_who(town.client, OUTSIDE_IP, {P2}, 30104)
    wait_who(town.client, vip, {P1, P2})  # the clusterIP is not concerned
    cluster.endpoints("web", pod(1))
    wait_for(
        lambda: refused(town.client, OUTSIDE_IP, 30104), "the NodePort of the node without endpoints to close"
    )
    wait_who(town.client, NODE_IP, {P1}, 30104)


def test_ingresses_in_the_nodes_networks(town: Town, vip: str) -> None:
    """The usual ingress on bare metal: externalIPs are the nodes' addresses, and so are the endpoints, with the same port.

    A node's own address leads to its own ingress, every other address to both in turns, and nobody to himself.
    """
    cluster = town.cluster
    other = pod(2, node=NODE_2, ip=OUTSIDE_IP)
    ports = [{"name": "http", "port": 80}]
    with PodServers() as second, PodServers() as first:
        second.add("ingress-2", town.two.listen("::", 80))
        second.start()
        cluster.create("services", service("ingress", vip, ports=ports, externalIPs=[NODE_IP, OUTSIDE_IP]))
        cluster.create("endpointslices", slice_of("ingress", other, ports=ports))
        for place in (town.client, town.one, town.two):
            for ip in (NODE_IP, OUTSIDE_IP):
                wait_who(place, ip, {"ingress-2"})
        # The Pod of node 1 comes up, and its server wants the port that proxyd has.
        cluster.endpoints("ingress", pod(1, ip=NODE_IP, ready=False), other, ports=ports)
        first.add("ingress-1", wait_for(lambda: listening(town.one, 80), "port 80 of node 1"))
        first.start()
        cluster.endpoints("ingress", pod(1, ip=NODE_IP), other, ports=ports)
        both = {"ingress-1", "ingress-2"}
        for place, ip, expected in (
            (town.client, NODE_IP, {"ingress-1"}),
            (town.one, NODE_IP, {"ingress-1"}),
            (town.two, OUTSIDE_IP, {"ingress-2"}),
            (town.client, OUTSIDE_IP, both),
            (town.one, OUTSIDE_IP, both),
            (town.two, NODE_IP, both),
            (town.client, vip, both),
            (town.two, vip, both),
        ):
            wait_who(place, ip, expected)
            if expected is both:
                assert many(place, ip, 80, 12).answered == {"ingress-1": 6, "ingress-2": 6}
        for daemon in town.daemons.values():
            states = {(one["address"], one["state"]) for one in daemon.get("listeners")}
            assert states == {(ip, "Serving") for ip in (vip, NODE_IP, OUTSIDE_IP)}
            wait_for(lambda daemon=daemon: not daemon.get("connections"), "no connection to be left")  # type: ignore[misc]  # a bound default has no type


def listening(place: Namespace, port: int) -> socket.socket | None:
    """A socket that listens at all addresses; None while that is not possible."""
    try:
        return place.listen("::", port)
    except OSError:
        return None


def test_external_traffic_policy_local_at_foreign_addresses(town: Town, vip: str) -> None:
    cluster = town.cluster
    foreign = ("203.0.113.91", "192.0.2.91")
    cluster.serve(
        "web",
        vip,
        pod(1),
        pod(2, node=NODE_2),
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        ingress=[{"ip": foreign[0]}],
        externalIPs=[foreign[1]],
    )
    for ip in foreign:
        wait_who(town.client, ip, {P1})
        wait_who(town.two, ip, {P2})
    cluster.endpoints("web", pod(1))
    for ip in foreign:
        wait_for(lambda ip=ip: not_answered(town.two, ip), f"{ip} to be refused")  # type: ignore[misc]  # a bound default has no type
        wait_who(town.client, ip, {P1})
    wait_who(town.two, vip, {P1})  # the clusterIP is not concerned


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
@pytest.mark.parametrize("ready", [True, False], ids=["one-ready", "all-terminating"])
def test_terminating_endpoints(town: Town, vip: str, policy: str, ready: bool) -> None:
    """Serving, terminating endpoints are used where no ready one is left, for each policy by itself, inside and outside."""
    going = {"ready": False, "serving": True, "terminating": True}
    gone = {"ready": False, "serving": False, "terminating": True}
    endpoints = [
        pod(1, **going),
        pod(3, **gone),
        pod(2, node=NODE_1 if policy == "Local" else NODE_2, ready=ready),
    ]
    ports = [{"name": "http", "port": 80, "nodePort": 30107}]
    policies = {"internalTrafficPolicy": policy, "externalTrafficPolicy": policy}
    town.cluster.serve("web", vip, *endpoints, ports=ports, type="NodePort", **policies)
    expected = {P2} if ready else {P1}
    wait_who(town.one, vip, expected)
    wait_who(town.client, NODE_IP, expected, 30107)
    other = expected if policy == "Cluster" else NOBODY
    wait_who(town.two, vip, other)
    wait_who(town.client, OUTSIDE_IP, other, 30107)


def test_ready_elsewhere_does_not_spare_the_fallback_of_local(town: Town, vip: str) -> None:
    ports = [{"name": "http", "port": 80, "nodePort": 30105}]
    going = {"ready": False, "serving": True, "terminating": True}
    endpoints = [pod(1, **going), pod(2, node=NODE_2)]
    town.cluster.serve("web", vip, *endpoints, ports=ports, type="NodePort", externalTrafficPolicy="Local")
    wait_who(town.client, vip, {P2})
    wait_who(town.client, NODE_IP, {P1}, 30105)
    wait_who(town.client, OUTSIDE_IP, {P2}, 30105)


def test_zone_hints(town: Town, vip: str) -> None:
    cluster = town.cluster
    cluster.serve("web", vip, pod(1, zones=["za"]), pod(2, zones=["zb"]), trafficDistribution="PreferClose")
    wait_who(town.one, vip, {P1})
    wait_who(town.two, vip, {P2})
    # One endpoint without hints: all of them.
    cluster.endpoints("web", pod(1, zones=["za"]), pod(2, zones=["zb"]), pod(3))
    wait_who(town.one, vip, {P1, P2, P3})
    # No hint for this zone: all of them.
    cluster.endpoints("web", pod(1, zones=["za"]), pod(3, zones=["za"]))
    wait_who(town.two, vip, {P1, P3})


def test_node_hints_go_before_zone_hints(town: Town, vip: str) -> None:
    endpoints = [
        pod(1, nodes=[NODE_1], zones=["za", "zb"]),
        pod(2, nodes=[NODE_2], zones=["za", "zb"]),
        pod(3, nodes=["node-3"], zones=["za"]),
    ]
    town.cluster.serve("web", vip, *endpoints, trafficDistribution="PreferSameNode")
    wait_who(town.one, vip, {P1})
    wait_who(town.two, vip, {P2})


def test_the_node_changes_its_zone(town: Town, vip: str) -> None:
    cluster = town.cluster
    cluster.serve("web", vip, pod(1, zones=["za"]), pod(2, zones=["zb"]))
    wait_who(town.one, vip, {P1})
    zone = "topology.kubernetes.io/zone"
    cluster.patch("nodes", NODE_1, {"metadata": {"labels": {zone: "zb"}}})
    try:
        wait_who(town.one, vip, {P2})
    finally:
        cluster.patch("nodes", NODE_1, {"metadata": {"labels": {zone: "za"}}})
    wait_who(town.one, vip, {P1})


# Labels


@pytest.mark.parametrize(
    "label", ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"]
)
def test_labels_that_take_a_service_away(town: Town, vip: str, label: str) -> None:
    cluster = town.cluster
    cluster.serve("web", vip, pod(1))
    cluster.serve("other", other := f"10.96.7.{next(_numbers)}", pod(2))
    wait_who(town.client, vip, {P1})
    wait_who(town.client, other, {P2})
    with Load(town.client, other, 80) as load:
        for _ in range(2):
            cluster.patch("services", "web", {"metadata": {"labels": {label: "x"}}})
            wait_for(lambda: who_or_nobody(town.client, vip) <= NOBODY, "the Service to be left alone")
            cluster.patch("services", "web", {"metadata": {"labels": {label: None}}})
            wait_who(town.client, vip, {P1})
        load.wait_more(5)
    assert (load.outcome.refused, load.outcome.broken) == ([], [])


# Health


def test_health_check_node_port(town: Town, vip: str) -> None:
    cluster = town.cluster
    spec: dict[str, Any] = {
        "type": "LoadBalancer",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 30199,
        "ports": [{"name": "http", "port": 80, "nodePort": 30106}],
    }
    cluster.serve("web", vip, pod(1), pod(2), **spec)

    def health(ip: str = NODE_IP, path: str = "/anything") -> tuple[int, int]:
        try:
            status, headers, body = town.fetch(town.client, f"http://{ip}:30199{path}")
        except OSError:
            return 0, 0
        answer = json.loads(body)
        assert answer["service"] == {"namespace": "default", "name": "web"}
        assert headers["X-Load-Balancing-Endpoint-Weight"] == str(answer["localEndpoints"])
        assert isinstance(answer["serviceProxyHealthy"], bool)
        return status, answer["localEndpoints"]

    wait_for(lambda: health() == (200, 2), "two local endpoints")
    assert health(path="/healthz") == (200, 2)
    # Also of a Service that has IPv4 alone.
    assert health(f"[{NODE_IP6}]") == (200, 2)
    wait_for(lambda: health(OUTSIDE_IP) == (503, 0), "none on the other node")
    # Only terminating ones: traffic is still served, but the load balancer is to go elsewhere.
    cluster.endpoints("web", pod(1, ready=False, serving=True, terminating=True))
    wait_for(lambda: health() == (503, 0), "a node that is to be left")
    wait_who(town.client, NODE_IP, {P1}, 30106)
    cluster.patch(
        "services", "web", {"spec": {"externalTrafficPolicy": "Cluster", "healthCheckNodePort": None}}
    )
    wait_for(lambda: refused(town.client, NODE_IP, 30199), "the health port to close")


def test_what_kube_proxys_urls_say(town: Town) -> None:
    status, _, body = town.fetch(town.client, f"http://{NODE_IP}:10256/healthz")
    assert status == 200
    answer = json.loads(body)
    assert answer["nodeEligible"] is True
    assert "lastUpdated" in answer
    assert "currentTime" in answer
    assert town.fetch(town.client, f"http://{NODE_IP}:10256/livez")[0] == 200
    status, headers, body = town.fetch(town.one, "http://127.0.0.1:10249/proxyMode")
    assert (status, body) == (200, "userspace")
    assert headers["Content-Type"].startswith("text/plain")
    metrics = town.fetch(town.one, "http://127.0.0.1:10249/metrics")[2]
    for name in (
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "kubeproxy_network_programming_duration_seconds",
        "rest_client_requests_total",
        "rest_client_request_duration_seconds",
        "kubernetes_build_info",
    ):
        assert f"# TYPE {name}" in metrics or f"\n{name}" in metrics, name


def test_a_node_that_is_taken_away_is_not_eligible(town: Town) -> None:
    def health(path: str) -> int:
        return town.fetch(town.client, f"http://{NODE_IP}:10256/{path}")[0]

    taint = [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]
    town.cluster.patch("nodes", NODE_1, {"spec": {"taints": taint}})
    try:
        wait_for(lambda: health("healthz") == 503, "an unhealthy node")
        assert health("livez") == 200
    finally:
        town.cluster.patch("nodes", NODE_1, {"spec": {"taints": None}})
    wait_for(lambda: health("healthz") == 200, "a healthy node")


# Changes under traffic


def test_a_rolling_update_loses_no_connection(town: Town, vip: str) -> None:
    cluster = town.cluster
    going = {"ready": False, "serving": True, "terminating": True}
    cluster.serve("web", vip, pod(1))
    wait_who(town.client, vip, {P1})
    with Load(town.client, vip, 80) as load:
        for old, new in itertools.islice(itertools.pairwise(itertools.cycle((1, 2, 3))), 9):
            cluster.endpoints("web", pod(old), pod(new, ready=False))
            cluster.endpoints("web", pod(old, **going), pod(new))
            load.wait_more(5)
            cluster.endpoints("web", pod(new))
            before = load.outcome.answered[f"pod-{new}"]
            wait_for(lambda: load.outcome.answered[f"pod-{new}"] > before, f"an answer of pod-{new}")  # noqa: B023  it is called within this turn
    assert (load.outcome.refused, load.outcome.broken) == ([], [])
    assert set(load.outcome.answered) == {P1, P2, P3}


def test_events_reach_the_api_server(town: Town, vip: str) -> None:
    def events(reason: str) -> list[Body]:
        items = town.cluster.request("GET", town.cluster._path("events"))["items"]
        return [item for item in items if item["reason"] == reason]

    wait_for(
        lambda: {item["involvedObject"]["name"] for item in events("Starting")} == {NODE_1, NODE_2},
        "Starting",
    )
    assert all(item["type"] == "Normal" for item in events("Starting"))
    town.cluster.serve("first", vip, pod(1), externalIPs=["203.0.113.99"])
    wait_who(town.client, vip, {P1})
    town.cluster.serve("second", f"10.96.7.{next(_numbers)}", pod(2), externalIPs=["203.0.113.99"])
    wait_for(lambda: events("PortConflict"), "an event about the conflict")
    (one, *_) = events("PortConflict")
    assert (one["involvedObject"]["kind"], one["involvedObject"]["name"], one["type"]) == (
        "Service",
        "second",
        "Warning",
    )


# Restarts


def test_an_api_server_at_an_external_ip(town: Town, vip: str) -> None:
    """A killed proxyd starts again, though its own way to the API server was taken: nothing relays there yet."""
    ports = [{"name": "https", "port": API_PORT}]
    town.cluster.serve("api", vip, pod(1, ip=NODE_IP), ports=ports, externalIPs=[NODE_IP])
    town.cluster.endpoints("api", pod(1, ip=NODE_IP), ports=ports)
    daemon = town.daemons[NODE_2]
    daemon.wait_listener(NODE_IP, API_PORT)
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    daemon.start()
    daemon.wait_listener(NODE_IP, API_PORT)


def test_restarts_of_proxyd_and_the_api_server(made: Town, vip: str) -> None:
    """Last of the file: it leaves the town with other processes, in the same state."""
    cluster, town = made.cluster, made
    cluster.serve("web", vip, pod(1), pod(2))
    wait_who(town.client, vip, {P1, P2})
    with Load(town.client, vip, 80) as load, connect(town.client, vip, 80) as held:
        for _ in range(20):
            cluster.kill()
            load.wait_more(5)
            cluster.start()
        # It is followed again: after so many failures within a minute, half a minute later at most.
        cluster.endpoints("web", pod(1))
        wait_who(town.client, vip, {P1})
        # It was there all the time.
        held.sendall(b"who\n")
        assert read_all(held).decode().strip() in {P1, P2}
    assert (load.outcome.refused, load.outcome.broken) == ([], [])
    daemon = town.daemons[NODE_1]
    cluster.kill()
    assert daemon.stop() == 0
    # Without an API server nothing is opened: what the cluster wants is not known.
    daemon.start(wait=False)
    wait_for(lambda: (daemon.try_get("services") == []) or None, "it to answer")
    assert who_or_nobody(town.client, vip) <= NOBODY
    cluster.start()
    wait_who(town.client, vip, {P1})
