"""VIPs that are in use around the node are refused or not handed out, and neighbours see nothing of the others."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.support.clients import ask, refused, turned_away, wait_for
from tests.support.daemon import COMMAND, Proxyd
from tests.support.manifests import endpoints, service, write
from tests.support.netlab import (
    BRIDGE_IP,
    CLIENT_POD_IP,
    NODE_FAR_IP,
    NODE_IP,
    NODE_IP6,
    OUTSIDE_IP,
    Lab,
    Namespace,
)

VIP, VIP6 = "10.96.0.10", "fd96::10"
LAN_HOST = "10.96.5.7"  # in a network that a test connects the node to

Run = Callable[..., Proxyd]


def serve(manifests: Path, name: str, vip: str, **spec: object) -> None:
    write(manifests / f"{name}.yaml", service(name, vip, **spec), endpoints(name, 1))


def warnings(daemon: Proxyd, event: str) -> list[str]:
    found = (json.loads(line) for line in daemon.log().splitlines() if line.startswith("{"))
    return [line["what"] for line in found if line["event"] == event]


def connect_lan(node: Namespace) -> None:
    """Connect the node to a network within the service range, on which there is nobody."""
    node.ip("link add name lan0 type bridge\naddr add 10.96.5.1/24 dev lan0\nlink set lan0 up")


COLLISIONS = {
    NODE_IP: "is an address of this node, at out0",
    BRIDGE_IP: "is an address of this node, at cbr0",
    "198.51.100.2": "is a next hop of this node, at far0",
    "10.97.0.1": "is a next hop of this node, at out0",  # outside of its networks
    "203.0.113.99": "is in 203.0.113.0/24, a network of this node at out0",
    "10.244.0.77": "is in 10.244.0.0/24, a network of this node at cbr0",
    "10.96.0.77": "is a neighbour's, at out0",
}


def test_a_vip_that_is_in_use_is_refused_with_the_reason(lab: Lab, manifests: Path, proxyd: Run) -> None:
    lab.node.ip(
        "route add 172.30.0.0/16 via 10.97.0.1 dev out0 onlink\nroute add 10.96.0.77/32 dev out0\n"
        "neigh add 10.96.0.77 lladdr 02:00:00:00:00:77 dev out0"
    )
    before = lab.node.run("ip", "route", "get", "10.97.0.1")
    for number, vip in enumerate(COLLISIONS):
        serve(manifests, f"bad-{number}", vip)
    serve(manifests, "web", VIP)
    with lab.node.listen("0.0.0.0", 22):
        daemon = proxyd()
        daemon.wait_listener(VIP, 80)
        for vip, why in COLLISIONS.items():
            told = daemon.wait_listener(vip, 80, "Conflict")
            assert told.detail == f"{vip} {why}; give the Service another clusterIP"
        # Nothing of the node or of others was taken.
        assert lab.node.run("ip", "route", "get", "10.97.0.1") == before
        assert refused(lab.outside, NODE_IP, 80)
        for ip in (NODE_IP, BRIDGE_IP):
            with lab.client.call(socket.create_connection, (ip, 22), 5):
                pass
    assert "10.96.0.77" not in lab.node.run("ip", "route", "show", "table", "local")
    # An externalIP may be the node's own: it is no VIP.
    serve(manifests, "bad-0", "10.96.0.11", externalIPs=[NODE_IP])
    daemon.wait_listener(NODE_IP, 80)
    assert ask(lab.outside, NODE_IP, 80) == "pod-1"


def test_ipv6(lab6: Lab, folder: Path, manifests: Path) -> None:
    for name, vip in (("own", NODE_IP6), ("pod", "fd00:10:244::77"), ("web", VIP6)):
        serve(manifests, name, vip, ipFamilies=["IPv6"])
    flags = ("--service-cluster-ip-range=10.96.0.0/16,fd96::/112",)
    with Proxyd(lab6.node, folder, manifests, flags=flags) as daemon:
        told = daemon.wait_listener(NODE_IP6, 80, "Conflict")
        assert told.detail.startswith(f"{NODE_IP6} is an address of this node, at out0")
        told = daemon.wait_listener("fd00:10:244::77", 80, "Conflict")
        assert "is in fd00:10:244::/64, a network of this node at cbr0" in told.detail
        daemon.wait_listener(VIP6, 80, "NoEndpoints")


def test_vips_that_are_bound_on_purpose_are_the_nodes_own(lab: Lab, manifests: Path, proxyd: Run) -> None:
    serve(manifests, "web", NODE_IP)
    proxyd(flags=("--vip-mode=bind",)).wait_listener(NODE_IP, 80)
    assert ask(lab.outside, NODE_IP, 80) == "pod-1"


def test_networks_come_and_go(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """What is handed out moves out of their way; what a manifest gives is refused, and served again."""
    serve(manifests, "given", LAN_HOST)
    for number in range(40):
        serve(manifests, f"s{number}", "")
    daemon = proxyd(flags=("--service-cluster-ip-range=10.96.4.0/23",))
    daemon.wait_listener(LAN_HOST, 80)
    before = {entry["name"]: entry["clusterIps"][0] for entry in daemon.get("services")}
    in_lan = {name for name, ip in before.items() if ip.startswith("10.96.5.") and name != "given"}
    assert len(in_lan) > 5
    connect_lan(lab.node)
    told = daemon.wait_listener(LAN_HOST, 80, "Conflict")
    assert told.detail.startswith(f"{LAN_HOST} is in 10.96.5.0/24, a network of this node at lan0")
    wait_for(
        lambda: len([each for each in daemon.listeners() if each.state == "Serving"]) == 40, "all others"
    )
    after = {entry["name"]: entry["clusterIps"][0] for entry in daemon.get("services")}
    assert {name for name in after if after[name] != before[name]} == in_lan
    assert {ip.rpartition(".")[0] for name, ip in after.items() if name != "given"} == {"10.96.4"}
    line = "10.96.4.0/23 overlaps 10.96.5.0/24, a network of this node at lan0"
    assert warnings(daemon, "part of --service-cluster-ip-range is in use: no VIPs of it") == [line]
    assert line in json.dumps(daemon.status()["problems"])
    lab.node.ip("link del lan0")
    daemon.wait_listener(LAN_HOST, 80)
    assert ask(lab.client, LAN_HOST, 80) == "pod-1"
    assert line not in json.dumps(daemon.status()["problems"])
    # What has moved stays.
    assert after == {entry["name"]: entry["clusterIps"][0] for entry in daemon.get("services")}


def test_a_service_range_within_a_network(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """All is refused at the start, with what to do; or served where the operator says so."""
    connect_lan(lab.node)
    serve(manifests, "given", LAN_HOST)
    serve(manifests, "web", "")
    flags = ("--service-cluster-ip-range=10.96.5.0/25",)
    daemon = proxyd(flags=flags)
    daemon.wait_listener(LAN_HOST, 80, "Conflict")
    problems = json.dumps(daemon.status()["problems"])
    assert "networks of this node (10.96.5.0/24) overlap it; choose another range" in problems
    assert "10.96.5.0/25 overlaps 10.96.5.0/24, a network of this node at lan0" in problems
    daemon.stop()
    daemon = proxyd(flags=(*flags, "--vip-overlap=serve"))
    daemon.wait_listener(LAN_HOST, 80)
    assert ask(lab.client, LAN_HOST, 80) == ask(lab.client, daemon.vip("default/web"), 80) == "pod-1"
    # Hosts of that network may ask who has it; others may not.
    lab.node.ip(
        f"link add name lan1 type veth peer name eth1 netns {lab.outside.path}\nlink set lan1 master lan0 up"
    )
    lab.outside.ip("link set eth1 up")
    wait_for(lambda: who_has(lab.outside, LAN_HOST, "10.96.5.9", "eth1"), "an answer")
    assert not who_has(lab.outside, LAN_HOST, OUTSIDE_IP)


def test_a_vip_that_somebody_has_put_on_an_interface_is_served(
    lab: Lab, manifests: Path, proxyd: Run
) -> None:
    """As kube-proxy's IPVS mode and NodeLocal DNSCache do, on an interface that has nothing else."""
    lab.node.ip(f"link add name kube0 type bridge\naddr add {VIP}/32 dev kube0\nlink set kube0 up")
    serve(manifests, "web", VIP)
    with lab.node.listen("0.0.0.0", 22):
        proxyd().wait_listener(VIP, 80)
        assert ask(lab.client, VIP, 80) == "pod-1"
        assert refused(lab.client, VIP, 22)


def test_check_warns(lab: Lab, manifests: Path, folder: Path) -> None:
    serve(manifests, "bad", NODE_IP)
    serve(manifests, "web", "")
    out = lab.node.run(*COMMAND, "check", "--service-cluster-ip-range=10.96.0.0/16", str(manifests))
    (line,) = [line for line in out.splitlines() if ": warning: " in line]
    assert f"Service default/bad: spec.clusterIP: {NODE_IP} is an address of this node, at out0; give" in line


# ARP and NDP


def who_has(namespace: Namespace, ip: str, sender: str, device: str = "eth0") -> bool:
    """Whether anybody answers the ARP request for an address within half a second."""

    def ask_link() -> bool:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as sock:
            sock.bind((device, 0x0806))
            mac = sock.getsockname()[4]
            request = struct.pack(
                "!HHBBH6s4s6s4s",
                1,
                0x800,
                6,
                4,
                1,
                mac,
                socket.inet_aton(sender),
                bytes(6),
                socket.inet_aton(ip),
            )
            sock.settimeout(0.5)
            sock.send(b"\xff" * 6 + mac + b"\x08\x06" + request)
            try:
                while True:
                    answer = sock.recv(100)
                    operation, _, source = struct.unpack_from("!H6s4s", answer, 20)
                    if operation == 2 and source == socket.inet_aton(ip):
                        return True
            except TimeoutError:
                return False

    return namespace.call(ask_link)


def test_neighbours_are_not_answered_for_vips_and_routed_traffic_is_served(
    lab6: Lab, folder: Path, manifests: Path
) -> None:
    node = lab6.node
    lab6.node.ip("link add name kube0 type bridge\naddr add 10.96.0.12/32 dev kube0\nlink set kube0 up")
    for name, vip in (("web", VIP), ("carried", "10.96.0.12")):
        serve(manifests, name, vip)
    six = service("six", VIP6, ipFamilies=["IPv6"])
    write(manifests / "six.yaml", six)
    flags = ("--service-cluster-ip-range=10.96.0.0/16,fd96::/112",)
    with Proxyd(node, folder, manifests, flags=flags) as daemon:
        daemon.wait_listener(VIP, 80)
        for host, own in ((lab6.outside, OUTSIDE_IP), (lab6.client, CLIENT_POD_IP)):
            assert ask(host, VIP, 80) == "pod-1"
            for vip in (VIP, "10.96.0.12"):
                assert not who_has(host, vip, own)
        for ip in (NODE_IP, NODE_FAR_IP):  # as the kernel does it for the node's own
            assert who_has(lab6.outside, ip, OUTSIDE_IP)
        assert who_has(lab6.client, BRIDGE_IP, CLIENT_POD_IP)
        # A host that takes VIPs for neighbours finds nobody.
        lab6.outside.ip(f"route add {VIP}/32 dev eth0")
        lab6.outside.run("ip", "-6", "route", "add", f"{VIP6}/128", "dev", "eth0")
        assert turned_away(lab6.outside, VIP, 80, within=10)
        assert turned_away(lab6.outside, VIP6, 80, within=10)
        lab6.outside.ip(f"route del {VIP}/32 dev eth0")
        assert ask(lab6.outside, VIP, 80) == "pod-1"
        # Where the node is a proxy for all that it can reach, it is one for VIPs too.
        node.sysctl(net__ipv4__conf__cbr0__proxy_arp="1")
        node.ip("addr add 10.9.0.1/24 dev kube0")  # news of an address
        wait_for(lambda: who_has(lab6.client, VIP, CLIENT_POD_IP), "an answer")
        assert not who_has(lab6.outside, VIP, OUTSIDE_IP)
        daemon.stop()
    assert "arp" not in node.run("nft", "list", "tables")


def test_the_node_does_not_ask_in_the_name_of_a_vip(lab: Lab, manifests: Path, proxyd: Run) -> None:
    """Before its answer from the VIP can leave it has to find the client; the neighbours would learn where the VIP is."""
    serve(manifests, "web", VIP)
    proxyd().wait_listener(VIP, 80)
    with (
        lab.outside.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as heard,
        lab.node.listen(VIP, 8080),
    ):
        heard.settimeout(1)
        # The client knows the node, and the node not yet the client: it has to ask.
        mac = json.loads(lab.node.run("ip", "-j", "link", "show", "out0"))[0]["address"]
        lab.outside.ip(f"neigh replace {NODE_IP} lladdr {mac} dev eth0 nud permanent")
        lab.node.run("ip", "neigh", "flush", "all")
        assert ask(lab.outside, VIP, 80) == "pod-1"
        senders = set()
        with suppress(TimeoutError):
            while True:
                frame = heard.recv(100)
                senders.add(socket.inet_ntoa(frame[28:32]))
    assert NODE_IP in senders
    assert VIP not in senders
    assert VIP not in lab.outside.run("ip", "neigh")
